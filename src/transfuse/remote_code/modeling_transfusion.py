"""An export of Transfuse as a model of Hugging Face's transformers: it captions images, reads them and writes.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    pipe(images=image, text="<image>", max_new_tokens=32)

Every export holds a copy of this file. The network, its autoencoder and the format of its sequences come from the
package transfuse, so that there is one of each. Drawing is the package's, too: `transfuse.load(folder)`.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import cached_file, convert_file_size_to_int

try:
    from transfuse.autoencoders import Autoencoder, VQTokenizer, load_autoencoder
    from transfuse.config import from_dict
    from transfuse.folders import upload
    from transfuse.images import decode_image, fit
    from transfuse.model import ModelConfig, Transfusion
    from transfuse.sequence import Document, Image, SequenceFormat, Text, layout_document
    from transfuse.sequence.tokenizer import TURNS
except ImportError as error:
    raise ImportError(
        "this model runs on the package transfuse, which no index has: install it from its repository, "
        f"pip install . in a checkout ({error})"
    ) from error

IMAGE = "<image>"
"""stands for an image in a text"""
FLATTEN = (
    "{%- set found = namespace(turns=[], text='') -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set found.text = message['content'] -%}"
    "{%- else -%}{%- set found.text = '' -%}{%- for part in message['content'] -%}"
    "{%- set found.text = found.text + ('<image>' if part['type'] == 'image' else part['text']) -%}{%- endfor -%}"
    "{%- endif -%}{%- set found.turns = found.turns + [dict(message, content=found.text)] -%}{%- endfor -%}"
    "{%- set messages = found.turns -%}"
)
"""gives a chat template, which is written for text, messages of text and images"""
UPLOADED = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
"""arguments of `save_pretrained` that are `push_to_hub`'s"""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""the cache's name in outputs, another since transformers 5.24"""
REFUSED = {
    **dict.fromkeys(("output_hidden_states", "output_attentions"), "the network does not return them"),
    "position_ids": "they follow from attention_mask",
    "inputs_embeds": "the network reads input_ids",
}
"""arguments of other models' forward, and why this one does not take them"""
OURS = (*TOKENIZER, "autoencoder", "transfuse_generation.json", "vocabulary.json", "README.md")
"""files of an export that transformers does not write, but `transfuse.load` reads"""


class TransfusionConfig(PretrainedConfig):
    """The configuration in an export's config.json. `model` has the fields of `transfuse.model.ModelConfig`."""

    model_type = "transfusion"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = model or {}
        network = from_dict(ModelConfig, self.model, "config.json: model") if model else None
        if network is not None:  # by transformers' names, for its caches and tools
            self.vocab_size, self.hidden_size = network.vocab_size, network.d_model
            self.num_hidden_layers, self.num_attention_heads = network.n_layers, network.n_heads
            self.num_key_value_heads, self.head_dim = network.kv_heads, network.head_dim
            self.max_position_embeddings = network.max_seq_len
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


class TransfusionForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The network with a language model's interface.

    An image is BOI, one position for each of its patches, EOI, as `TransfusionProcessor` lays it out: the positions are
    marked by repeating BOI's id.
    """

    config_class = TransfusionConfig
    main_input_name = "input_ids"
    _no_split_modules = {"Block"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__(config)
        network = Transfusion(from_dict(ModelConfig, config.model, "config.json: model"))
        for name, module in network.named_children():  # the weights keep the names of the export's file
            setattr(self, name, module)
        self.network = (network,)  # in a tuple, lest its weights have a second name
        self.folder: Path | None = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as any model of transformers; the export's folder is kept, for its autoencoder."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, folder = loaded[0] if isinstance(loaded, tuple) else loaded, Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            names = ("revision", "cache_dir", "token", "local_files_only")
            where = {name: kwargs[name] for name in names if name in kwargs}
            patterns = [name for part in OURS for name in (part, f"{part}/*")]
            folder = Path(snapshot_download(str(folder.as_posix()), allow_patterns=patterns, **where))
        model.folder = folder.absolute()  # the working directory may change
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the model with all that `transfuse.load` needs; its weights are one file.

        With `push_to_hub` also upload the folder: repo_id, token, private, ... are those of `push_to_hub`.

        Raises ValueError for a max_shard_size that the weights exceed.
        """
        most, size = kwargs.pop("max_shard_size", None), sum(x.nbytes for x in self.state_dict().values())
        if most is not None and size > convert_file_size_to_int(most):
            raise ValueError(f"max_shard_size: expected at least {size}, for weights are one file, found {most}")
        pushed = {name: kwargs.pop(name) for name in UPLOADED if name in kwargs}
        wanted, repository = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", Path(save_directory).name)
        super().save_pretrained(save_directory, *args, **{**kwargs, "max_shard_size": "1000TB"})
        for part in (self.folder / name for name in OURS) if self.folder is not None else ():
            target = Path(save_directory) / part.name
            if part.is_dir():
                shutil.copytree(part, target, dirs_exist_ok=True)
            elif part.is_file() and part.resolve() != target.resolve():
                shutil.copyfile(part, target)
        if wanted:
            self.push_to_hub(repository, **pushed)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, max_shard_size: int | str | None = None, **options: Any
    ) -> str:
        """Upload the export to the Hub with its own model card, and return the address of the commit.

        options: commit_message, commit_description, private, token, revision, create_pr and tags, as in transformers.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return upload(Path(folder), repo_id, **options)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The export's autoencoder, opened for the first image."""
        if self.folder is None:
            raise ValueError("pixel_values: expected a model that was loaded from an export, which has an autoencoder")
        autoencoder = load_autoencoder(self.folder / "autoencoder", device=self.device)
        return VQTokenizer(autoencoder) if self.network[0].config.images == "codes" else autoencoder

    def _init_weights(self, module: Any) -> None:
        """Leave torch's own initialisation: a model is trained with `transfuse train`."""

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the logits of the next tokens, `[sequence, position, id]`, and with labels the loss of text.

        input_ids, attention_mask   `[sequence, position]`, padded on either side
        pixel_values                uint8 `[sequence, image, row, column, 3]`; each sequence takes as many as its ids
                                    have places for. Only before the first token is written
        logits_to_keep              compute those of the last positions alone; 0: of all
        labels                      ids to predict, where `input_ids` has them; -100: not, as positions of images
        return_dict                 False returns a tuple, without what is None: loss, logits, past_key_values
        cache                       `past_key_values` as transformers 5.24 names it
        """
        past_key_values = cache if past_key_values is None else past_key_values
        for name, reason in REFUSED.items():
            if (given := kwargs.get(name)) is not None and given is not False:
                raise ValueError(f"{name}: expected none, for {reason}, found {given!r:.60}")
        (network,) = self.network
        network.compute_dtype = self.lm_head.weight.dtype
        rows, length = input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        known = input_ids.new_ones(rows, past + length) if attention_mask is None else attention_mask
        is_boi = input_ids == self.config.boi_token_id
        patches = is_boi & F.pad(is_boi, (1, 0))[:, :-1] & (past == 0)
        begins = patches & ~F.pad(patches, (1, 0))[:, :-1]  # the first patch of each image
        masks = self._visible(known.bool(), patches, begins, past)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, layer)
            mask = masks[network.config.windowed[layer]]
            if k.shape[2] != mask.shape[3]:
                sizes = f"{k.shape[2]} positions for {mask.shape[3]}"
                raise ValueError(f"past_key_values: expected a dynamic cache, found a static one of {sizes}")
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            return out.transpose(1, 2).reshape(rows * length, -1)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        wanted = torch.arange(rows * length, device=input_ids.device).view(rows, length)[:, kept].flatten()
        ids, images = input_ids.flatten(), {}
        positions = (known.cumsum(-1) - 1).clamp_min(0)[:, past:] + getattr(past_key_values, "position_shift", 0)
        if patches.any():
            latents = self._encode(begins, pixel_values)
            places = patches.flatten().nonzero().flatten()
            if network.config.positions == "2d":
                positions, shift = self._positions(known[:, past:], patches, begins, latents)
                if past_key_values is not None:
                    past_key_values.position_shift = shift
            if latents.is_floating_point():
                images = {"patches": places, "latents": latents, "timesteps": places.new_zeros(len(latents))}
            else:
                ids = ids.index_copy(0, places, latents.flatten() + network.config.text_vocab_size)
                images = {"patches": places}  # computed by separate weights, with `experts`
        logits = network(ids, positions.flatten(0, 1), attend, wanted, **images).logits.view(rows, -1, self.vocab_size)
        loss = None if labels is None else self._loss(logits, labels)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: past_key_values})
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[:2] != labels.shape:
            raise ValueError(f"labels: expected {tuple(logits.shape[:2])}, as logits, found {tuple(labels.shape)}")
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def _visible(self, known: Tensor, patches: Tensor, begins: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Return attention's masks of layers without and with a sliding window, bool `[sequence, 1, query, key]`.

        They are `transfuse.sequence.visible` and `transfuse.model.attention.window_start`, with padding.
        """
        length, keys, config = patches.shape[1], known.shape[1], self.network[0].config
        key = torch.arange(keys, device=known.device)
        query = key[past : past + length, None]
        visible, same_image = (key <= query) & known[:, None], query == key  # padding sees itself: no softmax is empty
        if not past and config.image_attention == "bidirectional":
            number = begins.cumsum(-1)
            of_one = patches[:, :, None] & patches[:, None] & (number[:, :, None] == number[:, None])
            same_image = same_image | of_one
        whole = (visible | same_image)[:, None]
        if config.sliding_window is None:
            return whole, whole
        place = known.cumsum(-1)  # padding takes no place in the window
        near = place[:, past : past + length, None] - place[:, None] < config.sliding_window
        return whole, ((visible & near) | same_image)[:, None]

    def _positions(self, known: Tensor, patches: Tensor, begins: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotary positions `[sequence, position, 3]` ("2d"), and what is added to those of later tokens."""
        config = self.network[0].config
        ends = (self.config.bos_token_id, self.config.eos_token_id, self.config.boi_token_id, self.config.eoi_token_id)
        grammar = SequenceFormat(*ends, config.patch_size, positions="2d")
        rows, columns = (side // config.patch_size for side in latents.shape[-2:])
        taken = torch.where(patches, begins * grammar.span(rows, columns), known).cumsum(-1)
        positions = (taken - 1).clamp_min(0)[..., None].expand(-1, -1, 3).float().clone()
        for row, place in begins.nonzero().tolist():
            image = grammar.patch_positions(int(taken[row, place - 1]), rows, columns)
            positions[row, place : place + rows * columns] = torch.from_numpy(image).to(positions)
        return positions, taken[:, -1:] - known.sum(-1, keepdim=True)

    def _encode(self, begins: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Return the latents or codes of the images that the ids have places for, in their order."""
        if pixel_values is None:
            raise ValueError("pixel_values: expected those of the images in input_ids, found none")
        used = torch.arange(pixel_values.shape[1], device=begins.device) < begins.sum(-1, keepdim=True)
        if int(used.sum()) != int(begins.sum()):
            raise ValueError(f"pixel_values: expected {int(begins.sum())} images, found {int(used.sum())}")
        pixels = pixel_values[used.to(pixel_values.device)].cpu().numpy()
        latents = self.autoencoder.encode(pixels)
        return latents.to(self.device, self.dtype if latents.is_floating_point() else latents.dtype)


class TransfusionProcessor(ProcessorMixin):
    """Texts and images to input_ids, attention_mask and pixel_values: `<image>` in a text is where an image stands.

    image_size   pixels along a side; other images are cropped to the middle square and resized
    image_grid   an image's patches, or codes, along a side
    begin_token  with which texts begin that no chat template has rendered; None: the tokenizer's bos_token
    """

    attributes = ("tokenizer",)
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 0,
        image_grid: int = 0,
        chat_template: str | None = None,
        begin_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.image_grid = image_size, image_grid
        self.tokenizer_files: list[str] = []
        tokenizer.padding_side = "left"
        self.begin_token = begin_token or tokenizer.bos_token or "<|bos|>"
        tokenizer.bos_token = tokenizer.bos_token or self.begin_token
        tokenizer.eos_token = tokenizer.eos_token or "<|eos|>"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        super().__init__(tokenizer, chat_template=chat_template or FLATTEN + (tokenizer.chat_template or TURNS))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the tokenizer and processor_config.json of an export."""
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        where = {name: value for name, value in kwargs.items() if name in names}
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **where)
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **where)
        begin = settings.get("begin_token")
        processor = cls(tokenizer, settings["image_size"], settings["image_grid"], begin_token=begin)
        optional = {"_raise_exceptions_for_missing_entries": False, **where}
        files = (cached_file(pretrained_model_name_or_path, name, **optional) for name in TOKENIZER)
        processor.tokenizer_files = [str(Path(file).absolute()) for file in files if file is not None]
        return processor

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write as any processor of transformers, with the tokenizer's files that `transfuse.load` knows."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / "chat_template.jinja").unlink(missing_ok=True)  # made of the tokenizer's
        for file in map(Path, self.tokenizer_files):
            if file.resolve() != (Path(save_directory) / file.name).resolve():
                shutil.copyfile(file, Path(save_directory) / file.name)
        return saved

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        padding: bool | str = True,
        return_tensors: str = "pt",
        truncation: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return a batch of prompts. Without a text each image is a prompt, to be captioned.

        images: one, a list for all texts in order, or a list for each text. Where there is one image for each text, and
        no text says where it stands, it stands before its text. padding: to the longest, on the left.

        Raises ValueError for another number of images, no prompt, and what is not done here.
        """
        if truncation or padding == "max_length" or return_tensors not in ("pt", None):
            given = f"padding {padding!r}, truncation {truncation!r}, return_tensors {return_tensors!r}"
            raise ValueError(
                f"processor: expected padding to the longest, no truncation and torch's tensors, found {given}"
            )
        pixels = [decode_image(image) for image in _flat(images)]
        texts = [IMAGE] * len(pixels) if text is None else list(text) if isinstance(text, list | tuple) else [text]
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError(f"text: expected a text, or a list of them, found {text!r:.80}")
        if pixels and len(pixels) == len(texts) and not any(IMAGE in prompt for prompt in texts):
            texts = [IMAGE + prompt for prompt in texts]
        counts = [prompt.count(IMAGE) for prompt in texts]
        for name in ("<|boi|>", "<|eoi|>"):
            if any(name in prompt for prompt in texts) and self.chat_template != FLATTEN + TURNS:
                raise ValueError(f"text: expected {IMAGE} where an image stands, found the marker {name}")
        if sum(counts) != len(pixels):
            raise ValueError(f"images: expected {sum(counts)}, as texts have {IMAGE}, found {len(pixels)}")
        rows = [self._ids(prompt) for prompt in texts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        batch = {"input_ids": ids, "attention_mask": mask}
        if pixels:
            side, number = self.image_size, 0
            values = torch.zeros(len(rows), max(counts), side, side, 3, dtype=torch.uint8)
            for row, count in enumerate(counts):
                for place in range(count):
                    values[row, place] = torch.from_numpy(fit(pixels[number], side))
                    number += 1
            batch["pixel_values"] = values
        return BatchFeature(batch)

    def _ids(self, prompt: str) -> list[int]:
        """Lay out a prompt as training did; BOI's id marks the positions of an image's patches.

        Markers' names act as markers in what a chat template has rendered; without one they are plain characters.
        """
        plain = self.chat_template == FLATTEN + TURNS
        bos, eos, boi, eoi = (
            self.tokenizer.convert_tokens_to_ids(name)
            for name in (self.begin_token, self.tokenizer.eos_token, "<|boi|>", "<|eoi|>")
        )
        first = None  # what a chat template begins with stands in place of BOS
        for number, token in () if plain else self.tokenizer.added_tokens_decoder.items():
            if token.special and token.content != IMAGE and prompt.startswith(token.content):
                first, prompt = number, prompt.removeprefix(token.content)
                break
        image = Image(torch.empty(1, self.image_grid, self.image_grid, device="meta"), target=False)
        parts: list[Any] = []
        for number, words in enumerate(prompt.split(IMAGE)):
            parts += [image] * (number > 0)
            ids = self.tokenizer(words, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
            parts.append(Text(tuple(ids)))
        layout = layout_document(Document(parts, closed=False, first=first), SequenceFormat(bos, eos, boi, eoi, 1))
        layout.input_ids[layout.image >= 0] = boi
        return layout.input_ids.tolist()

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images: Any) -> list[Any]:
    """Return images in order, from one, a list, or a list for each text."""
    if images is None:
        return []
    return [image for part in images for image in _flat(part)] if isinstance(images, list | tuple) else [images]
