"""What packs put on a MODEL, for probe_model_nodes: each is there while its context lasts.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = dict[str, Any]


class PackChanges:
    """Changes of a clone, or of the network it shares with all others."""

    network: Any

    @contextmanager
    def on_function_wrapper(self, model: Any) -> Iterator[None]:
        model.set_model_unet_function_wrapper(
            lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"])
        )
        yield

    @contextmanager
    def on_block_replaced(self, model: Any) -> Iterator[None]:
        def block(args: Answer, more: Answer) -> Answer:
            out = more["original_block"](args)
            return {"img": 0.9 * out["img"], "txt": out["txt"]}

        model.set_model_patch_replace(block, "dit", "double_block", 1)
        yield

    @contextmanager
    def on_text_added(self, model: Any) -> Iterator[None]:
        """As a style reference does: more tokens before the text's."""
        import torch

        def patch(inputs: Answer) -> Answer:
            more = {
                name: torch.cat((0.5 * inputs[name][:, :3], inputs[name]), dim=1)
                for name in ("txt", "txt_ids")
            }
            return {**inputs, **more}

        model.set_model_post_input_patch(patch)
        yield

    @contextmanager
    def on_wrapper_without_key(self, model: Any) -> Iterator[None]:
        model.add_wrapper("apply_model", lambda run, *args, **more: 0.9 * run(*args, **more))
        yield

    @contextmanager
    def on_sampler_wrapper_without_key(self, model: Any) -> Iterator[None]:
        model.add_wrapper("outer_sample", lambda run, *args, **more: run(*args, **more))
        yield

    @contextmanager
    def on_option_of_its_own(self, model: Any) -> Iterator[None]:
        model.model_options["another pack"] = {"on": True}
        model.model_options["transformer_options"]["another pack"] = {"on": True}
        yield

    @contextmanager
    def on_before_each_step(self, model: Any) -> Iterator[None]:
        model.add_callback("on_prepare_state", lambda *_: None)
        yield

    @contextmanager
    def on_latent_changed(self, model: Any) -> Iterator[None]:
        model.add_object_patch("process_latent_in", lambda latent: 2 * latent)
        yield

    @contextmanager
    def on_noise_scaled(self, model: Any) -> Iterator[None]:
        levels = type(model.get_model_object("model_sampling"))(model.model.model_config)
        levels.noise_scale = 2.0
        model.add_object_patch("model_sampling", levels)
        yield

    @contextmanager
    def on_forward_patched(self, model: Any) -> Iterator[None]:
        model.add_object_patch("diffusion_model.forward_orig", blind_forward(self.network))
        yield

    @contextmanager
    def on_forward_of_the_object(self, model: Any) -> Iterator[None]:
        self.network.forward_orig = blind_forward(self.network)
        yield
        del self.network.forward_orig

    @contextmanager
    def on_forward_of_the_class(self, model: Any) -> Iterator[None]:
        kind = type(self.network)
        original = kind.forward_orig

        @functools.wraps(original)  # says that it is ComfyUI's
        def forward(*args: Any, **more: Any) -> Any:
            return original(*args, **more)

        kind.forward_orig = forward
        yield
        kind.forward_orig = original

    @contextmanager
    def on_forward_during_the_pass(self, model: Any) -> Iterator[None]:
        """As step caches do: their own copy of the forward, for as long as a pass takes."""

        def wrapper(apply: Callable[..., Any], args: Answer) -> Any:
            self.network.forward_orig = blind_forward(self.network)
            try:
                return apply(args["input"], args["timestep"], **args["c"])
            finally:
                del self.network.forward_orig

        model.set_model_unet_function_wrapper(wrapper)
        yield

    @contextmanager
    def on_network_left_out(self, model: Any) -> Iterator[None]:
        model.add_wrapper_with_key("diffusion_model", "other", lambda run, x, *_, **__: 0.1 * x)
        yield

    @contextmanager
    def on_network_exchanged(self, model: Any) -> Iterator[None]:
        import torch

        model.add_object_patch("diffusion_model", torch.nn.Linear(1, 1))
        yield

    @contextmanager
    def on_pass_without_a_picture(self, model: Any) -> Iterator[None]:
        model.set_model_unet_function_wrapper(lambda apply, args: None)
        yield

    @contextmanager
    def on_network_hidden(self, model: Any) -> Iterator[None]:
        kind = type("QuantFlux", (type(self.network),), {"__module__": "/a/custom_nodes/Quant"})
        self.network.__class__ = kind
        yield
        self.network.__class__ = kind.__mro__[1]


def blind_forward(network: Any) -> Callable[..., Any]:
    """A copy of the network's own forward that asks for no patches."""
    original = type(network).forward_orig

    def forward(*args: Any, transformer_options: Answer | None = None, **more: Any) -> Any:
        options = {**(transformer_options or {}), "patches": {}}
        return original(network, *args, transformer_options=options, **more)

    return forward
