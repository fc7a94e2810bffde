"""An export of Transfuse, in diffusers' layout, as a pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipe("a crab on a blue background", num_inference_steps=20, guidance_scale=3.0).images[0]

Every export in that layout holds a copy of this file. The drawing is the package's (`transfuse.load`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

try:
    import transfuse
    from transfuse.errors import UserError
    from transfuse.export import relayout
    from transfuse.folders import find_export, is_repository, upload
    from transfuse.images import ImageSource
    from transfuse.inference.arguments import ImageSources
except ImportError as error:
    raise ImportError(
        "this pipeline runs on the package transfuse, which no index has: install it from its repository, "
        f"pip install . in a checkout ({error})"
    ) from error


UPLOADED = ("commit_message", "private", "token", "create_pr", "subfolder")
"""arguments of `save_pretrained` that are `push_to_hub`'s"""


def part(name: str) -> property:
    """Return a property that reads one of `components`, and refuses another part in its place."""

    def read(self: TransfusionDiffusionPipeline) -> Any:
        return self.components[name]

    def refuse(self: TransfusionDiffusionPipeline, value: Any) -> None:
        own = f"{name}: expected the export's own, for a call chooses steps, guidance and eta"
        raise UserError(f"{own}, found a {type(value).__name__}")

    return property(read, refuse)


class TransfusionDiffusionPipeline(DiffusionPipeline):
    """Draws and edits as `transfuse.inference.TransfusionPipeline`, with diffusers' arguments and outputs.

    The parts are read from the export, and no others take their place. Raises UserError, one line, for given parts.
    """

    pipe: Any = None
    """the package's pipeline, once the export is open"""
    transformer, vae, scheduler, tokenizer = map(part, ("transformer", "vae", "scheduler", "tokenizer"))

    def __init__(
        self,
        transformer: Any = None,
        vae: Any = None,
        scheduler: Any = None,
        tokenizer: Any = None,
        weights: str = "",
    ) -> None:
        super().__init__()  # the names that model_index.json has; the export is opened whole
        for name, given in {
            "transformer": transformer,
            "vae": vae,
            "scheduler": scheduler,
            "tokenizer": tokenizer,
        }.items():
            if not isinstance(given, list | tuple | None):  # a list is model_index.json's name of a class
                alone = "alone (from_pretrained), for it draws with its own parts"
                raise UserError(f"pipeline: expected the folder of an export {alone}, found a {name}")
        self._weights = weights
        self._dtype: torch.dtype | None = None

    def register_to_config(self, **kwargs: Any) -> None:
        """Keep the configuration; open the export once `from_pretrained` has said which it is."""
        super().register_to_config(**kwargs)  # type: ignore[misc]
        if "_name_or_path" in kwargs:
            name = kwargs["_name_or_path"]
            self.folder = find_export(name).absolute()  # the working directory may change
            self._open("cpu", torch.float32)
            newest = self.pipe.exported.fingerprint
            if is_repository(name) and self._weights not in ("", newest):  # of a revision that is not known here
                hint = "open the folder that huggingface_hub.snapshot_download returns for a revision"
                raise UserError(f"{name}: expected weights {self._weights}, found the newest, {newest}: {hint}")

    def _open(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.pipe = transfuse.load(str(self.folder), dtype=dtype, device=device)

    @property
    def components(self) -> dict[str, Any]:
        """The network, autoencoder and tokenizer of the package, and the scheduler that diffusers reads."""
        if self.pipe is None:
            raise UserError("pipeline: expected the folder of an export (from_pretrained), found none")
        exported = self.pipe.exported
        config = diffusers.DDIMScheduler.load_config(self.folder, subfolder="scheduler")
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        parts = {"transformer": exported.model, "vae": exported.autoencoder, "tokenizer": exported.tokenizer}
        return {**parts, "scheduler": scheduler}

    @property
    def device(self) -> torch.device:
        return next(self.pipe.exported.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.exported.model.compute_dtype

    def to(self, *args: Any, **kwargs: Any) -> TransfusionDiffusionPipeline:
        """Move to a device, a dtype or both, as `torch.nn.Module.to`; the export is opened again."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: kwargs[k] for k in ("device", "dtype") if k in kwargs})
        self._open(device or self.device, dtype or self.dtype)
        self._dtype = dtype or self._dtype
        return self

    @property
    def interrupt(self) -> bool:
        """True once a callback has ended the drawing."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self.pipe is not None and self.pipe._interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self.pipe._interrupt = value

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the export, in this layout, in the dtype that `to` was given, else in that of its file.

        With `push_to_hub` also upload it: repo_id, token, private, ... are those of `push_to_hub`.
        """
        if args or kwargs.get("variant") or not kwargs.get("safe_serialization", True):
            raise UserError("save_pretrained: expected no variant, and safetensors, found others")
        relayout(self.folder, Path(save_directory), "diffusers", self._dtype)
        if push_to_hub:
            pushed = {name: kwargs[name] for name in UPLOADED if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **pushed)

    def push_to_hub(self, repo_id: str, *, subfolder: str | None = None, **options: Any) -> str:
        """Upload the export to the Hub with its own model card, and return the address of the commit.

        options: commit_message, private, token and create_pr, as in diffusers.
        """
        written = {name: options.pop(name) for name in ("variant", "safe_serialization") if name in options}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "export", **written)
            return upload(Path(folder) / "export", repo_id, path_in_repo=subfolder, **options)

    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        image: ImageSources | None = None,
        strength: float | None = None,
        mask_image: ImageSource | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: torch.Generator | int | list[torch.Generator | int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw an image for each prompt; None leaves a setting to the model.

        image         one for all prompts, or one for each: an output of any type but "latent" is one, too
        eta           share of DDIM's noise that is drawn again; above 0 the sampler is DDIM
        output_type   "pil", "np" (float32 `[image, row, column, 3]`), "pt" (`[image, 3, row, column]`) or "latent"
        return_dict   False returns `(images,)`
        callback_on_step_end(pipe, step, timestep, {"latents": ...})   sees the latents, and cannot change them;
                      `pipe._interrupt = True` ends the drawing as it is

        Raises UserError, one line, for values that cannot be.
        """
        if self.pipe is None:
            raise UserError("pipeline: expected the folder of an export (from_pretrained), found its parts")
        given = callback_on_step_end_tensor_inputs
        if not isinstance(given, list | tuple) or any(name != "latents" for name in given):
            raise UserError(f"callback_on_step_end_tensor_inputs: expected latents alone, found {given!r:.80}")
        step_end = None
        if callback_on_step_end is not None:
            if not callable(callback_on_step_end):
                raise UserError(f"callback_on_step_end: expected a function, found {callback_on_step_end!r:.80}")

            def step_end(pipe: Any, step: int, t: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
                return callback_on_step_end(self, step, t, tensors)

        images: Any = self.pipe(
            prompt,
            negative_prompt=negative_prompt,
            image=image,
            strength=strength,
            mask_image=mask_image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            sampler="ddim" if eta else None,
            eta=eta,
            generator=generator,
            callback_on_step_end=step_end,
            output_type=output_type,
        ).images
        if output_type == "np":
            images = np.stack(images).astype(np.float32) / 255
        elif output_type != "pil":
            images = torch.stack(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
