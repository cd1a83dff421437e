"""The differences between the models, as frozen data.

A new family is one value here, one parity test and one workflow. No other file tests for a
family by name; where the data is not enough, a field is missing in `specs.py`.
"""

from dataclasses import replace

from .previews import NANO_FLUX1_PREVIEW, NANO_FLUX2_PREVIEW
from .specs import (
    AutoencoderSpec,
    ClipT5Spec,
    EmpiricalShift,
    FluxFamily,
    LanguageModelSpec,
    LatentSpec,
    LinearShift,
    ReferenceSize,
    ReferenceSpec,
    TransformerSpec,
)
from .system_message import SYSTEM_MESSAGE

FLUX1_LATENT = LatentSpec(
    name="FLUX.1",
    channels=16,
    downscale=8,
    patch=2,
    scale=0.3611,
    shift=0.1159,
    id_axes=("index", "row", "column"),
    first_index=1.0,
    index_step=1.0,
)
# The nano autoencoder is trained so that FLUX.1's scale and shift normalise it too; its latents
# still decode to different images, hence a name of its own.
NANO_FLUX1_LATENT = replace(
    FLUX1_LATENT,
    name="FLUX.1 nano",
    preview_rgb=NANO_FLUX1_PREVIEW,
)
FLUX1_AUTOENCODER = AutoencoderSpec(
    channels=128, channel_mult=(1, 2, 4, 4), res_blocks=2, norm_groups=32, latent=FLUX1_LATENT
)

FLUX1_TEXT = ClipT5Spec(clip_tokens=77, t5_tokens=512)
_FLUX1_TRANSFORMER = TransformerSpec(
    hidden=3072,
    double_blocks=19,
    single_blocks=38,
    mlp_ratio=4.0,
    in_channels=64,
    out_channels=64,
    context_width=4096,
    pooled_width=768,
    has_guidance=True,
    axes_dim=(16, 56, 56),
    theta=10_000.0,
)
_FLUX1_SCHNELL_TRANSFORMER = replace(_FLUX1_TRANSFORMER, has_guidance=False)

FLUX1_KONTEXT = FluxFamily(
    name="flux1-kontext",
    title="FLUX.1 Kontext [dev]",
    transformer=_FLUX1_TRANSFORMER,
    latent=FLUX1_LATENT,
    text=FLUX1_TEXT,
    references=ReferenceSpec(trained=1),
    schedule=LinearShift(),
    guidance="embedded",
    default_steps=30,
    default_guidance=2.5,
    file_hints=("kontext",),
    source="black-forest-labs/flux@802fb47 src/flux/util.py configs, src/flux/cli_kontext.py",
)
FLUX1_DEV = FluxFamily(
    name="flux1-dev",
    title="FLUX.1 [dev]",
    transformer=_FLUX1_TRANSFORMER,
    latent=FLUX1_LATENT,
    text=FLUX1_TEXT,
    references=ReferenceSpec(trained=0),
    schedule=LinearShift(),
    guidance="embedded",
    default_steps=50,
    default_guidance=2.5,
    file_hints=("flux1-dev", "flux-dev", "flux1_dev", "flux_dev"),
    source="black-forest-labs/flux@802fb47 src/flux/util.py configs, src/flux/cli.py",
)
FLUX1_KREA = replace(FLUX1_DEV, name="flux1-krea", title="FLUX.1 Krea [dev]", file_hints=("krea",))
FLUX1_SCHNELL = replace(
    FLUX1_DEV,
    name="flux1-schnell",
    title="FLUX.1 [schnell]",
    transformer=_FLUX1_SCHNELL_TRANSFORMER,
    text=replace(FLUX1_TEXT, t5_tokens=256),
    schedule=None,
    guidance="none",
    is_step_distilled=True,
    default_steps=4,
    default_guidance=0.0,  # as in huggingface/diffusers; it has no guidance input
    file_hints=("schnell",),
)
NANO_KONTEXT = FluxFamily(
    name="nano-kontext",
    title="Glassbox nano Kontext",
    transformer=replace(
        _FLUX1_TRANSFORMER,
        hidden=256,
        double_blocks=2,
        single_blocks=4,
        context_width=192,
        pooled_width=128,
    ),
    latent=NANO_FLUX1_LATENT,
    text=ClipT5Spec(title="Glassbox nano CLIP and T5", clip_tokens=20, t5_tokens=20),
    references=ReferenceSpec(trained=1),
    schedule=LinearShift(),
    guidance="embedded",
    default_steps=8,
    default_guidance=1.0,
    file_hints=("glassbox_nano_kontext",),
    source="this project, tools/nano/train.py",
)
NANO_AUTOENCODER = AutoencoderSpec(
    channels=16, channel_mult=(1, 2, 4, 8), res_blocks=1, norm_groups=2, latent=NANO_FLUX1_LATENT
)


# black-forest-labs/flux2@ab7cca6 src/flux2/sampling.py; huggingface/diffusers@0.42.1 scales to
# 1024**2 for one reference too.
FLUX2_ONE_REFERENCE = ReferenceSize(
    shortest_px=64, longest_aspect=8.0, most_px=2024**2, multiple=16
)
FLUX2_SEVERAL_REFERENCES = replace(FLUX2_ONE_REFERENCE, most_px=1024**2)
FLUX2_LATENT = LatentSpec(
    name="FLUX.2",
    channels=128,
    downscale=16,
    patch=1,
    scale=1.0,
    shift=0.0,
    id_axes=("index", "row", "column", "text"),
    text_axis=3,
    first_index=10.0,
    index_step=10.0,
    placement="index",
    reference=FLUX2_ONE_REFERENCE,
)
NANO_FLUX2_LATENT = replace(
    FLUX2_LATENT,
    name="FLUX.2 nano",
    preview_rgb=NANO_FLUX2_PREVIEW,
)
FLUX2_AUTOENCODER = AutoencoderSpec(
    channels=128,
    channel_mult=(1, 2, 4, 4),
    res_blocks=2,
    norm_groups=32,
    patch=2,
    latent=FLUX2_LATENT,
)
FLUX2_SMALL_DECODER = replace(FLUX2_AUTOENCODER, decoder_channels=96)
NANO_FLUX2_AUTOENCODER = replace(NANO_AUTOENCODER, patch=2, latent=NANO_FLUX2_LATENT)

_FLUX2_TRANSFORMER = TransformerSpec(
    hidden=6144,
    double_blocks=8,
    single_blocks=48,
    mlp_ratio=3.0,
    in_channels=128,
    out_channels=128,
    context_width=15360,
    pooled_width=0,
    has_guidance=True,
    axes_dim=(32, 32, 32, 32),
    theta=2000.0,
    has_bias=False,
    is_gated=True,
    shares_modulation=True,
)
_KLEIN_9B_TRANSFORMER = replace(
    _FLUX2_TRANSFORMER, hidden=4096, single_blocks=24, context_width=12288, has_guidance=False
)
_KLEIN_4B_TRANSFORMER = replace(
    _KLEIN_9B_TRANSFORMER, hidden=3072, double_blocks=5, single_blocks=20, context_width=7680
)
MISTRAL_SMALL_3 = LanguageModelSpec(
    title="Mistral Small 3.2 24B",
    architecture="mistral3",
    hidden=5120,
    ffn=32768,
    layers=(10, 20, 30),
    tokens=512,
    padding="left",
    pad_token="<pad>",
    prefix=f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]",
    suffix="[/INST]",
    removed=("[IMG]",),
    theta=1e9,
    norm_eps=1e-5,
)
QWEN3_8B = LanguageModelSpec(
    title="Qwen3 8B",
    architecture="qwen3",
    hidden=4096,
    ffn=12288,
    layers=(9, 18, 27),
    tokens=512,
    padding="right",
    pad_token="<|endoftext|>",
    prefix="<|im_start|>user\n",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
QWEN3_4B = replace(QWEN3_8B, title="Qwen3 4B", hidden=2560, ffn=9728)
LANGUAGE_MODELS = (MISTRAL_SMALL_3, QWEN3_8B, QWEN3_4B)

_KLEIN_REFERENCES = ReferenceSpec(trained=4, several_px=FLUX2_SEVERAL_REFERENCES.most_px)
_FLUX2_REFERENCES = replace(_KLEIN_REFERENCES, trained=6)  # dev: the most that is recommended
FLUX2_DEV = FluxFamily(
    name="flux2-dev",
    title="FLUX.2 [dev]",
    transformer=_FLUX2_TRANSFORMER,
    latent=FLUX2_LATENT,
    text=MISTRAL_SMALL_3,
    references=_FLUX2_REFERENCES,
    schedule=EmpiricalShift(),
    guidance="embedded",
    default_steps=50,
    default_guidance=4.0,
    file_hints=("flux2-dev", "flux-2-dev"),
    source="black-forest-labs/flux2@ab7cca6 src/flux2/model.py Flux2Params, scripts/cli.py",
)
FLUX2_KLEIN_9B = FluxFamily(
    name="flux2-klein-9b",
    title="FLUX.2 [klein] 9B",
    transformer=_KLEIN_9B_TRANSFORMER,
    latent=FLUX2_LATENT,
    text=QWEN3_8B,
    references=_KLEIN_REFERENCES,
    schedule=EmpiricalShift(),
    guidance="none",
    default_steps=4,
    default_guidance=1.0,
    is_step_distilled=True,
    file_hints=("klein-9b",),
    source="black-forest-labs/flux2 src/flux2/util.py FLUX2_MODEL_INFO",
)
FLUX2_KLEIN_9B_KV = replace(
    FLUX2_KLEIN_9B,
    name="flux2-klein-9b-kv",
    title="FLUX.2 [klein] 9B KV",
    references=replace(_KLEIN_REFERENCES, sequence=("text", "reference", "target"), isolated=True),
    file_hints=("klein-9b-kv", "klein-kv"),
)
FLUX2_KLEIN_BASE_9B = replace(
    FLUX2_KLEIN_9B,
    name="flux2-klein-base-9b",
    title="FLUX.2 [klein] base 9B",
    guidance="true cfg",
    default_steps=50,
    default_guidance=4.0,
    is_step_distilled=False,
    file_hints=("klein-base-9b", "klein-9b-base", "klein-base"),
)
FLUX2_KLEIN_4B = replace(
    FLUX2_KLEIN_9B,
    name="flux2-klein-4b",
    title="FLUX.2 [klein] 4B",
    transformer=_KLEIN_4B_TRANSFORMER,
    text=QWEN3_4B,
    file_hints=("klein-4b", "klein"),
)
FLUX2_KLEIN_BASE_4B = replace(
    FLUX2_KLEIN_BASE_9B,
    name="flux2-klein-base-4b",
    title="FLUX.2 [klein] base 4B",
    transformer=_KLEIN_4B_TRANSFORMER,
    text=QWEN3_4B,
    file_hints=("klein-base-4b", "klein-4b-base", "klein-base"),
)
NANO_QWEN3 = replace(
    QWEN3_4B,
    title="Glassbox nano Qwen3",
    hidden=96,
    ffn=192,
    layers=(1, 2, 3),
    tokens=36,
    heads=4,
    kv_heads=2,
    head_dim=32,
)
NANO_KLEIN = FluxFamily(
    name="nano-klein",
    title="Glassbox nano klein",
    transformer=replace(
        _KLEIN_4B_TRANSFORMER, hidden=256, double_blocks=2, single_blocks=4, context_width=288
    ),
    latent=NANO_FLUX2_LATENT,
    text=NANO_QWEN3,
    references=replace(_KLEIN_REFERENCES, trained=2),
    schedule=EmpiricalShift(),
    guidance="none",
    default_steps=4,
    default_guidance=1.0,
    file_hints=("glassbox_nano_klein",),
    source="this project, tools/nano/train.py",
)

LATENTS = {
    latent.name: latent
    for latent in (FLUX1_LATENT, NANO_FLUX1_LATENT, FLUX2_LATENT, NANO_FLUX2_LATENT)
}
TOKEN_PX = max(latent.token_px for latent in LATENTS.values())  # a multiple suits every model
REFERENCE_SIZES = {
    "FLUX.2 one reference": FLUX2_ONE_REFERENCE,
    "FLUX.2 several references": FLUX2_SEVERAL_REFERENCES,
}
AUTOENCODERS = (
    FLUX1_AUTOENCODER,
    NANO_AUTOENCODER,
    FLUX2_AUTOENCODER,
    FLUX2_SMALL_DECODER,
    NANO_FLUX2_AUTOENCODER,
)

# In the order their file hints are tried: "flux1-dev-kontext" is Kontext. A file
# without a hint that fits several is taken for the last of them: the plainest.
FAMILIES = {
    family.name: family
    for family in (
        NANO_KONTEXT,
        FLUX1_KONTEXT,
        FLUX1_KREA,
        FLUX1_SCHNELL,
        FLUX1_DEV,
        NANO_KLEIN,
        FLUX2_DEV,
        FLUX2_KLEIN_BASE_4B,
        FLUX2_KLEIN_BASE_9B,
        FLUX2_KLEIN_9B_KV,
        FLUX2_KLEIN_9B,
        FLUX2_KLEIN_4B,
    )
}
