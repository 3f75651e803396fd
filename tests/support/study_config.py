"""The settings that tests of the study start from."""

from study.config import Config

CONFIG = Config(
    experiment="fig2",
    preset="small",
    model="cnn",
    dataset="mnist5k",
    optimizer="oscgd",
    lr=0.1,
    epochs=3,
    n_train=50,
    width=4,
    image_size=16,
    micro_batch=16,
    matrices=(),
    seed=0,
    layers="module",
    device="cpu",
    threads=1,
)
