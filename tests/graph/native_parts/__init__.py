"""Nodes for the test server alone: ComfyUI's own text encoders at any size.

ComfyUI's loaders take CLIP-L, T5-XXL and Qwen3 at their published sizes. These read the sizes off
the files and build the same classes, so that a graph runs with small random files; inputs are those
of the loaders they stand for. Linked into the server's custom_nodes, they know nothing of the pack.
"""

import types
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy.text_encoders import flux

HEAD = 64  # the width of a head, in CLIP and T5
QWEN_HEAD = 128
State = dict[str, Any]


def read(name: str) -> State:
    path = folder_paths.get_full_path_or_raise("text_encoders", name)
    return comfy.utils.load_torch_file(path, safe_load=True)


def layers_of(state: State, stem: str) -> int:
    """How many numbered layers there are below `stem`."""
    return 1 + max(int(key[len(stem) :].split(".")[0]) for key in state if key.startswith(stem))


def make(model: Any, tokenizer: Any, states: list[State], **sizes: State) -> Any:
    """ComfyUI's CLIP around one of its classes, with the weights of the files."""
    target = types.SimpleNamespace(params={}, clip=model, tokenizer=tokenizer)
    dtype = next(iter(states[-1].values())).dtype
    return comfy.sd.CLIP(target, state_dict=states, model_options={"dtype": dtype, **sizes})


class LoadTinyPair:
    """Stands for DualCLIPLoader, type flux."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> State:  # noqa: N802 - the name ComfyUI calls
        files = (folder_paths.get_filename_list("text_encoders"),)
        wanted = {"clip_name1": files, "clip_name2": files, "type": (["flux"],)}
        return {"required": wanted, "optional": {"device": (["default"],)}}

    def load(self, clip_name1: str, clip_name2: str, **_: str) -> tuple[Any]:
        clip, t5 = read(clip_name1), read(clip_name2)
        words = clip["text_model.embeddings.token_embedding.weight"]
        block = "encoder.block.0.layer."
        clip_sizes = {
            "hidden_size": words.shape[1],
            "num_hidden_layers": layers_of(clip, "text_model.encoder.layers."),
            "num_attention_heads": words.shape[1] // HEAD,
            "intermediate_size": clip["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        }
        t5_sizes = {
            "d_model": t5["shared.weight"].shape[1],
            "d_kv": HEAD,
            "d_ff": t5[block + "1.DenseReluDense.wi_0.weight"].shape[0],
            "num_layers": layers_of(t5, "encoder.block."),
            "num_heads": t5[block + "0.SelfAttention.q.weight"].shape[0] // HEAD,
        }
        sizes = {"clip_l_model_config": clip_sizes, "t5xxl_model_config": t5_sizes}
        model = flux.flux_clip(dtype_t5=t5["shared.weight"].dtype)
        return (make(model, flux.FluxTokenizer, [clip, t5], **sizes),)


class LoadTinyQwen:
    """Stands for CLIPLoader, type flux2, with Qwen3 4B."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> State:  # noqa: N802 - the name ComfyUI calls
        files = (folder_paths.get_filename_list("text_encoders"),)
        wanted = {"clip_name": files, "type": (["flux2"],)}
        return {"required": wanted, "optional": {"device": (["default"],)}}

    def load(self, clip_name: str, **_: str) -> tuple[Any]:
        state = read(clip_name)
        layer, words = "model.layers.0.", state["model.embed_tokens.weight"]
        sizes = {
            "hidden_size": words.shape[1],
            "intermediate_size": state[layer + "mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": layers_of(state, "model.layers."),
            "num_attention_heads": state[layer + "self_attn.q_proj.weight"].shape[0] // QWEN_HEAD,
            "num_key_value_heads": state[layer + "self_attn.k_proj.weight"].shape[0] // QWEN_HEAD,
        }
        model = flux.klein_te(dtype_llama=words.dtype, model_type="qwen3_4b")
        return (make(model, flux.KleinTokenizer, [state], qwen3_4b_model_config=sizes),)


NODE_CLASS_MAPPINGS = {"TestLoadTinyPair": LoadTinyPair, "TestLoadTinyQwen": LoadTinyQwen}
