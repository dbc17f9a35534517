"""Cache policies: what is stored of a model's evaluations, how it is forecast, and which evaluations are computed."""
