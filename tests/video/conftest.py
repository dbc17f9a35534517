"""Makes ComfyUI importable before the files of this folder import it."""

from pack import use_comfyui

use_comfyui()
