"""Flux Glassbox: every step of FLUX.1 as a ComfyUI node."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Give ComfyUI the pack's extension; nothing is imported before it asks."""
    from .nodes import Glassbox

    return Glassbox()
