"""The package: `oscopt`, and `oscopt.kernels` from the folder kernels/."""

from pathlib import Path

from setuptools import setup

version = next(
    line.split('"')[1]
    for line in Path("oscopt/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
cpu = ["numba>=0.61"]
integrations = ["lightning>=2.4", "transformers>=4.50", "accelerate>=1", "wandb>=0.19"]
bench = ["torchvision>=0.26", "matplotlib>=3.9", "rich>=13", "mlxtend>=0.23"]
bench += ["scikit-learn>=1.4", "scipy>=1.12"]
compare = [*bench, "prodigyopt>=1.1", "schedulefree>=1.4"]

setup(
    name="oscopt",
    version=version,
    description="PyTorch gradient descent that measures gradient oscillation, at almost no cost",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=["oscopt", "oscopt.kernels"],
    package_dir={"oscopt.kernels": "kernels"},
    package_data={"oscopt": ["py.typed", "page.css", "page.js"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "cpu": cpu,
        "bench": bench,
        "compare": compare,
        "integrations": integrations,
        "test": [
            *cpu,
            *bench,
            *integrations,
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis>=6.100",
            "pandas>=2",
            "xarray",
            "tensorboard",
            "expecttest",  # what torch.testing._internal imports
            "ruff>=0.8",
            "mypy>=1.13",
            "setuptools>=77",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
