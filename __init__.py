"""Tessera: efficient Diffusion Transformer nodes for ComfyUI. Nodes live in nodes/, one file each."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import TesseraExtension

    return TesseraExtension()
