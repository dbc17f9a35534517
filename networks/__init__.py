"""Networks that neither ComfyUI nor a package it brings has, in plain torch over our kernels."""
