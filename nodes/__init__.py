"""Every node, one file each, found by walking this folder: schema and wiring only, no maths. A file that does not
import, or a schema that does not build, costs that one node, a folder that does not import the nodes in it; either is
logged with its name."""

import importlib
import logging
import pkgutil
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyAPI, ComfyExtension, io

log = logging.getLogger("tessera")
ROOT = Path(__file__).resolve().parents[1]


def discover(strict: bool = False) -> list[type[io.ComfyNode]]:
    """The node classes, in order of their files. strict: raise instead of logging."""
    found: list[type[io.ComfyNode]] = []

    def lost(folder: str) -> None:
        if strict:
            raise
        log.exception("Tessera: nodes folder %s failed to import, its nodes are missing", folder.split("nodes.", 1)[-1])

    for info in pkgutil.walk_packages(__path__, __name__ + ".", onerror=lost):
        if not info.ispkg:
            found += _load(info.name, strict)
    return found


def _load(name: str, strict: bool) -> list[type[io.ComfyNode]]:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit):  # a file that leaves Python must not take the others with it
        if strict:
            raise
        log.exception("Tessera: nodes file %s failed to import, its node is missing", name.split("nodes.", 1)[-1])
        return []
    classes = [
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, io.ComfyNode) and c.__module__ == name
    ]
    good = []
    for node in classes:
        try:
            node.GET_SCHEMA()
        except Exception:
            if strict:
                raise
            log.exception("Tessera: the schema of %s is broken, this node is missing", node.__name__)
        else:
            good.append(node)
    return good


class TesseraExtension(ComfyExtension):
    async def on_load(self) -> None:
        folder_paths.add_model_folder_path("diffusion_models", str(ROOT / "models"))
        _serve()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        _routes()
        found = discover()
        log.info("Tessera: %d nodes, %s", len(found), _kernels())
        await _register(found)
        return found


async def _register(found: list[type[io.ComfyNode]]) -> None:
    """Offers our nodes for those of other packs; a ComfyUI without a server, or without replacements, goes without."""
    try:
        from ..patching.replacements import replacements

        for replacement in replacements(found):
            await ComfyAPI().node_replacement.register(replacement)
    except Exception:
        log.info("Tessera: nodes of other packs are not replaced here", exc_info=log.isEnabledFor(logging.DEBUG))


def _routes() -> None:
    """A ComfyUI without a server goes without."""
    try:
        from ..patching.block_stop import register

        register()
    except Exception:
        log.info("Tessera: its routes are not served here", exc_info=log.isEnabledFor(logging.DEBUG))


def _serve() -> None:
    """The sidebar's routes; without them it starts empty after a reload."""
    try:
        from ..patching.history import serve

        serve()
    except Exception:
        log.info(
            "Tessera: the sidebar cannot ask this server for earlier runs", exc_info=log.isEnabledFor(logging.DEBUG)
        )


def _kernels() -> str:
    from ..kernels._triton import triton

    version = getattr(triton, "__version__", None)
    return f"Triton {version}" if version else "reference kernels (no Triton)"
