"""The small trained models' words and pixels: what a prompt means to them and how a latent becomes an image."""
