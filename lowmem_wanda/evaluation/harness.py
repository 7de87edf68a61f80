"""A streamed model for lm-evaluation-harness: all of the harness's requests go through the blocks together.

For each request, the model is given the same tokens, and the same ones are evaluated, as with the harness's own `hf`
model (HFLM in its models/huggingface.py). Only the order of the computing differs.
"""

import logging
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from lowmem_wanda.errors import ModelError
from lowmem_wanda.evaluation.requests import Answer, collect_inputs, group_inputs, sweep
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import StreamedModel, open_model
from lowmem_wanda.streaming.tokenizer import load_tokenizer
from lowmem_wanda.streaming.walk import Notify

Request = tuple[Any, list[int], list[int]]  # its key in the harness, ids of its context, ids of its continuation

LOGGER = logging.getLogger(__name__)
GENERATES = (
    "a model that is streamed block by block does not generate text; run only tasks of output_type multiple_choice, "
    "loglikelihood or loglikelihood_rolling"
)


@register_model("lowmem")
class Lowmem(TemplateLM):  # type: ignore[misc]
    """The checkpoint in the folder `pretrained`, as a model for the harness.

    A `model` that is already open may take the checkpoint's place. `max_ram` and `max_vram` are as on our command line:
    8 (GB), "8GB", "500MB". `max_length` is the most tokens of an input (default: the model's own limit).
    `add_bos_token` and `prefix_token_id` are those of HFLM. `batch_size` and `max_batch_size` change nothing, because
    memory decides how much is computed at a time. `sweeps`, `tokens` and `truncated` count passes over the model,
    padded tokens, and requests that lost their beginning. `on_block` is called with each block's record, to which
    "sweep" and "sweeps" are added.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch: int | None = None,
        model: StreamedModel | None = None,
        max_ram: float | str | None = None,
        max_vram: float | str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        on_block: Notify | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ModelError(
                f"--model_args {min(unknown)}: lowmem has no such argument; see lowmem_wanda/evaluation/harness.py"
            )
        ram, vram = (None if size is None else str(size) for size in (max_ram, max_vram))
        self.streamed = model or open_model(pretrained, Machine.of(device, dtype, batch, trust_remote_code, ram, vram))
        beginning = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        self.tokenizer = load_tokenizer(self.streamed.checkpoint, self.streamed.trust_remote_code, **beginning)
        self.sweeps = self.tokens = self.truncated = 0
        self._device, self._on_block = self.streamed.device, on_block
        self._max_length, self._add_bos, self._prefix = max_length, add_bos_token, prefix_token_id
        prefix = self._prefix_or_none()
        self._beginning = None if prefix is None else self.tokenizer.decode(prefix)

    @property
    def eot_token_id(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer has no such token."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        """The id to put before a text that has no context. Raises ModelError where the tokenizer has no such id."""
        token = self._prefix_or_none()
        if token is None:
            raise ModelError(
                f"{self.streamed.checkpoint.path}: its tokenizer has no BOS or EOS token to put before a text without "
                "a context; give --model_args prefix_token_id=ID"
            )
        return token

    def _prefix_or_none(self) -> int | None:
        tokens = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((token for token in tokens if token is not None), None)

    @property
    def max_length(self) -> int:
        """The most tokens of an input, as HFLM finds it."""
        return self._max_length or int(resolve_max_length(self.streamed.skeleton.model.config, self.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, without its system messages where the template has no place for them."""
        settings = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            text = self.tokenizer.apply_chat_template(chat_history, tokenize=False, **settings)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            text = self.tokenizer.apply_chat_template(others, tokenize=False, **settings)
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, with the tokenizer's special tokens; none are added if the text begins with one."""
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self._beginning is not None and string.startswith(self._beginning):
            special = False
        settings = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **settings))

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Raises ModelError: each token would take a sweep."""
        raise ModelError(f"generate_until: {GENERATES}")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, from windows of at most `max_length` tokens that evaluate each token once."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            owners += [number] * len(found)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[number] += value
        return sums

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        """The answers to all requests. Raises ModelError for a request that HFLM refuses as well."""
        if not requests:
            return []
        self._check(requests)
        questions = [(context, continuation) for _, context, continuation in requests]
        sweeps = group_inputs(self.streamed, collect_inputs(questions, self.max_length))
        self.sweeps, self.tokens = self.sweeps + len(sweeps.slices), self.tokens + sum(sweeps.sizes)
        answers: dict[int, Answer] = {}
        quiet = disable_tqdm or self._on_block is not None
        with tqdm(total=len(sweeps.slices) * self.streamed.depth, desc="Streaming blocks", disable=quiet) as bar:
            for number in range(len(sweeps.slices)):
                answered = sweep(self.streamed, sweeps, number, self._telling(bar, number, len(sweeps.slices)))
                for question, answer in answered.items():
                    if (name := requests[question][0]) is not None:  # with --use_cache, another run goes on from here
                        self.cache_hook.add_partial("loglikelihood", name, answer)
                answers |= answered
        return [answers[number] for number in range(len(requests))]

    def _check(self, requests: list[Request]) -> None:
        most = self.max_length
        for name, context, continuation in requests:
            if not context or not 0 < len(continuation) <= most:
                raise ModelError(
                    f"request {name!r}: {len(context)} tokens of context and {len(continuation)} of continuation; give "
                    f"at least 1 of both, and of the continuation at most {most} (max_length)"
                )
        lost = sum(len(context) + len(continuation) > most + 1 for _, context, continuation in requests)
        self.truncated += lost
        if lost:
            LOGGER.warning(f"{lost} of {len(requests)} requests are longer than {most} tokens and lose their beginning")

    def _telling(self, bar: Any, number: int, count: int) -> Notify:
        """A Notify that passes on the block records of sweep `number` of `count`."""

        def tell(record: dict[str, Any]) -> None:
            bar.update()
            if self._on_block is not None:
                self._on_block({**record, "sweep": number, "sweeps": count})

        return tell
