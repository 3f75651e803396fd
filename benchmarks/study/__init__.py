"""The study of the paper: experiments, data, models, training, figures."""
