"""Which node and widget each setting is that the library names in brackets.

A note or an error of `flux_core` says "set [steps]"; whoever reads it in ComfyUI is told "set
steps on 'Schedule (FLUX)'".
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from ..flux_core.errors import GlassboxError, name_settings

_FIT, _NOISE, _SCHEDULE = "'Fit Image (FLUX)'", "'Noise (FLUX)'", "'Schedule (FLUX)'"
_CONDITIONER, _CFG = "'Reference Conditioner (FLUX)'", "'Sample True CFG (FLUX)'"
_PLACE, _GUIDER = "'Position Ids (FLUX)'", "'Guider (FLUX)'"

SETTINGS = {
    # nodes as a whole
    "model loader": "'Load Model (FLUX)'",
    "text encoder loader": "'Load Text Encoders (FLUX)'",
    "autoencoder loader": "'Load Autoencoder (FLUX)'",
    "nano loader": "'Load Nano (FLUX)'",
    "LoRA loader": "'Apply LoRA (FLUX)'",
    "text encoding": "'Encode Text (FLUX)'",
    "image fit": _FIT,
    "image encoding": "'Encode and Pack (FLUX)'",
    "image decoding": "'Unpack and Decode (FLUX)'",
    "latent packing": "'Pack Latent (FLUX)'",
    "noise": _NOISE,
    "schedule": _SCHEDULE,
    "guided sampling": "'Sample Guided (FLUX)'",
    "true CFG": _CFG,
    "native conditioning": "'To Conditioning (FLUX)'",
    "guider": _GUIDER,
    "native positions": "'Apply To Model (FLUX)'",
    # widgets and inputs
    "family": "family on 'Load Model (FLUX)'",
    "model dtype": "dtype on 'Load Model (FLUX)'",
    "text encoder dtype": "dtype on 'Load Text Encoders (FLUX)'",
    "autoencoder dtype": "dtype on 'Load Autoencoder (FLUX)'",
    "block_strengths": "block_strengths on 'Apply LoRA (FLUX)'",
    "prompt": "the prompt of 'Encode Text (FLUX)'",
    "text tokens": "t5_tokens on 'Encode Text (FLUX)'",
    "fit size": f"size on {_FIT}",
    "fit method": f"method on {_FIT}",
    "fit width": f"width on {_FIT}",
    "fit height": f"height on {_FIT}",
    "latent_format": "latent_format on 'Pack Latent (FLUX)'",
    "index": f"index on {_PLACE}",
    "row": f"row on {_PLACE}",
    "column": f"column on {_PLACE}",
    "guidance": f"guidance on {_CONDITIONER}",
    "placement": f"placement on {_CONDITIONER}",
    "references": f"references on {_CONDITIONER}",
    "width": f"width on {_NOISE}",
    "height": f"height on {_NOISE}",
    "seed": f"seed on {_NOISE}",
    "batch_size": f"batch_size on {_NOISE}",
    "steps": f"steps on {_SCHEDULE}",
    "schedule kind": f"kind on {_SCHEDULE}",
    "sigmas": f"sigmas on {_SCHEDULE}",
    "denoise": f"denoise on {_SCHEDULE}",
    "cfg": f"cfg on {_CFG}",
    "cfg start": f"start on {_CFG}",
    "cfg end": f"end on {_CFG}",
    "passes": f"passes on {_CFG}",
    "solver": "solver on the sampler",
    "sampler": "sampler on the sampler",
    "start tokens": "start_tokens on the sampler",
    "reference_kv": "reference_kv on the sampler",
}


ON_GUIDER = {  # where the guider is that runs, and no sampler of this pack
    **SETTINGS,
    "cfg": f"cfg on {_GUIDER}",
    "cfg start": f"start on {_GUIDER}",
    "cfg end": f"end on {_GUIDER}",
    "passes": f"passes on {_GUIDER}",
    "reference_kv": f"reference_kv on {_GUIDER}",
    "width": "width of the empty latent",
    "height": "height of the empty latent",
    "batch_size": "batch_size of the empty latent",
    "start tokens": "latent_image of 'SamplerCustomAdvanced'",
}


def in_words(text: str) -> str:
    """A note of the library with the nodes and widgets that its settings are."""
    return name_settings(text, SETTINGS)


@contextmanager
def settings_named(names: Mapping[str, str] = SETTINGS) -> Generator[None, None, None]:
    """Lets errors of the library that leave this block name nodes and widgets."""
    try:
        yield
    except GlassboxError as error:
        error.name_settings(names)
        raise
