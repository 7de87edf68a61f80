"""Quantized tensors that are read as bfloat16: fp8 with block scales (DeepSeek, Qwen) and MXFP4 (gpt-oss).

fp8     `X` (..., rows, columns) of F8_E4M3, and `X_scale_inv`: one scale for each block of 128 x 128 values, say, by
        which they are multiplied in float32 (DeepSeek-V3, arXiv 2412.19437, 3.3)
mxfp4   `X_blocks` (experts, outputs, groups, 16) of two 4-bit numbers a byte, the lower one first, and `X_scales`: one
        power of two for each group of 32 inputs (OCP Microscaling Formats 1.0); `X` is (experts, inputs, outputs)

Values are those that transformers gives when it dequantizes, bit for bit. Nothing here needs torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.reader import PIECE, Tensor, in_pieces
from lowmem_wanda.errors import CheckpointError

KINDS = ("fp8", "mxfp4")
CHUNK = 1 << 17  # values that are dequantized at a time, few enough for a CPU's cache
SCALES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E8M0": "u1"}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
GROUP = 32  # inputs of MXFP4 that share a scale


@dataclass(frozen=True)
class Quantized(Tensor):
    """A bfloat16 tensor, or a part of one, whose values are those of `packed` times `scales`.

    `offset` counts its own bytes, from where `packed` begins. `block` are the rows and columns that share a scale.
    """

    packed: Tensor | None = None
    scales: Tensor | None = None
    block: tuple[int, int] = (1, GROUP)

    @property
    def is_made(self) -> bool:
        """True: its bytes are computed."""
        return True

    def pieces(self, size: int = PIECE, spans: Sequence[tuple[int, int]] | None = None) -> Iterator[bytearray]:
        """Yields the bytes of the values as `Tensor` does."""
        assert self.packed is not None and self.scales is not None
        begin = self.offset - self.packed.offset
        for start, stop in ((0, self.nbytes),) if spans is None else spans:
            yield from in_pieces(self._bytes(begin + start, begin + stop), stop - start, size)

    def _bytes(self, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes from `start` up to `stop`, of all values of `packed`."""
        row = 2 * self.shape[-1]
        first, last = start // row, -(-stop // row)
        rows = self._rows_of_fp8(first, last) if self.dtype_of_packed != "U8" else self._rows_of_fp4(first, last)
        at = first * row
        for values in rows:
            content = values.tobytes()
            yield content[max(0, start - at) : min(len(content), stop - at)]
            at += len(content)

    @property
    def dtype_of_packed(self) -> str:
        """The dtype of what is in the file."""
        return self.packed.dtype if self.packed else ""

    def _rows_of_fp8(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Yields the bits of some rows at a time, uint16 (rows, columns); rows of all matrices are counted."""
        assert self.packed is not None and self.scales is not None
        (rows, columns), (down, along) = self.packed.shape[-2:], self.block
        scales = _floats(self.scales).reshape(-1, self.scales.shape[-1])
        each = -(-rows // down)  # rows of scales of one matrix
        step = max(1, CHUNK // columns)
        for start in range(first, last, step):
            stop = min(last, start + step)
            number = np.arange(start, stop)
            scale = scales[number // rows * each + number % rows // down]
            packed = b"".join(self.packed.pieces(spans=[(start * columns, stop * columns)]))
            values = _from_fp8(np.frombuffer(packed, np.int8)).reshape(-1, columns)
            values *= np.repeat(scale, along, axis=1)[:, :columns]
            yield _rounded(values)

    def _rows_of_fp4(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Yields the bits of some inputs of an expert at a time, uint16 (inputs, outputs)."""
        assert self.packed is not None and self.scales is not None
        _, outputs, groups, _ = self.packed.shape
        inputs, expert_bytes = groups * GROUP, outputs * groups * GROUP // 2
        step = max(1, CHUNK // outputs // GROUP)
        for expert in range(first // inputs, -(-last // inputs)):
            content = b"".join(self.packed.pieces(spans=[(expert * expert_bytes, (expert + 1) * expert_bytes)]))
            packed = np.frombuffer(content, np.uint8).reshape(outputs, groups, GROUP // 2)
            span = expert * outputs * groups, (expert + 1) * outputs * groups
            scales = np.frombuffer(b"".join(self.scales.pieces(spans=[span])), np.uint8).reshape(outputs, groups, 1)
            low, high = max(0, first - expert * inputs), min(inputs, last - expert * inputs)
            for group in range(low // GROUP, -(-high // GROUP), step):
                here = slice(group, group + step)
                values = FP4[np.stack([packed[:, here] & 15, packed[:, here] >> 4], axis=-1)]
                values = values.reshape(outputs, -1, GROUP)
                values = np.ldexp(values, scales[:, here].astype(np.int32) - 127).reshape(outputs, -1)
                start = group * GROUP
                values = values[:, max(0, low - start) : high - start]
                yield _rounded(np.ascontiguousarray(values.T))


def _floats(tensor: Tensor) -> np.ndarray:
    """All values of scales, float32."""
    values = np.frombuffer(b"".join(tensor.pieces()), SCALES[tensor.dtype]).reshape(tensor.shape)
    if tensor.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == "F8_E8M0":
        return np.ldexp(np.float32(1), values.astype(np.int32) - 127)
    return values.astype(np.float32)


def _from_fp8(numbers: np.ndarray) -> np.ndarray:
    """The values of F8_E4M3 numbers, float32: their bits, in the place of float32's, are the value times 2^-120."""
    bits = numbers.astype(np.int32)
    bits <<= 20
    bits &= np.int32(-0x78100000)  # the sign, four bits of exponent and three of fraction
    values: np.ndarray = bits.view(np.float32)
    values *= np.float32(2.0**120)
    wrong = numbers & 127 == 127
    if wrong.any():
        values[wrong] = np.nan
    return values


def _rounded(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values, rounded to the nearest bfloat16, to the even one of two."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)
    return (bits >> 16).astype("<u2")


def source_bytes(tensor: Tensor) -> int:
    """The bytes that a tensor takes in its file, with its scales where it is quantized."""
    if isinstance(tensor, Quantized) and tensor.packed and tensor.scales:
        return tensor.packed.nbytes + tensor.scales.nbytes
    return tensor.nbytes


def kind_of(config: Mapping[str, Any]) -> str:
    """How config.json says that weights are quantized; "" where they are not."""
    found = config.get("quantization_config")
    kind = found.get("quant_method", "unknown") if found and isinstance(found, dict) else found
    return str(kind) if kind else ""


def dequantized(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a quantized checkpoint, by name, read as bfloat16. Raises CheckpointError."""
    kind = kind_of(config)
    if kind and kind not in KINDS:
        raise CheckpointError(
            f"config.json: quantization_config says {kind}; --dequantize reads fp8 with block scales and mxfp4, so get "
            "or make the bf16 checkpoint"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if tensor.dtype == "F8_E4M3" and scales is not None:
            found[name] = _of_fp8(tensor, scales, config)
        elif scales is not None:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {name} is {tensor.dtype}, and {scales.name} has scales for it, which only "
                "F8_E4M3 has; download it again, or get or make the bf16 checkpoint"
            )
        elif kind == "mxfp4" and name.endswith("_blocks") and (scales := tensors.get(f"{name[:-7]}_scales")):
            if name[:-7] in tensors:
                raise CheckpointError(
                    f"{tensor.file.name}: tensor {name[:-7]} stands beside its own blocks {name}, so it is unclear "
                    "which one counts; remove one"
                )
            found[name[:-7]] = _of_fp4(tensor, scales)
        elif not name.endswith("_scale_inv") and not (kind == "mxfp4" and name.endswith("_scales")):
            found[name] = tensor
    return found


def _of_fp8(packed: Tensor, scales: Tensor, config: Mapping[str, Any]) -> Tensor:
    said = config.get("quantization_config")
    block = said.get("weight_block_size") if isinstance(said, dict) else None
    match block:
        case [int(down), int(along)] if down > 0 and along > 0 and len(packed.shape) in (2, 3):
            grid = (*packed.shape[:-2], -(-packed.shape[-2] // down), -(-packed.shape[-1] // along))
        case _:
            grid = ()
    if scales.shape != grid or scales.dtype not in SCALES:
        raise CheckpointError(
            f"{scales.file.name}: tensor {scales.name} is {scales.dtype} {list(scales.shape)}, not a scale for each "
            f"block ({block}) of {packed.name} {list(packed.shape)}; get or make the bf16 checkpoint"
        )
    return _made(packed, scales, packed.name, packed.shape, (down, along))


def _of_fp4(packed: Tensor, scales: Tensor) -> Tensor:
    four = len(packed.shape) == 4 and packed.shape[-1] == GROUP // 2
    if packed.shape[:-1] != scales.shape or not four or (packed.dtype, scales.dtype) != ("U8", "U8"):
        raise CheckpointError(
            f"{packed.file.name}: tensor {packed.name} is {packed.dtype} {list(packed.shape)} with scales "
            f"{scales.dtype} {list(scales.shape)}, not MXFP4 as gpt-oss has it; get or make the bf16 checkpoint"
        )
    experts, outputs, groups, _ = packed.shape
    return _made(packed, scales, packed.name[:-7], (experts, groups * GROUP, outputs), (1, GROUP))


def _made(packed: Tensor, scales: Tensor, name: str, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    fields = vars(replace(packed, name=name, dtype="BF16", shape=shape, nbytes=2 * math.prod(shape)))
    return Quantized(**fields, packed=packed, scales=scales, block=block)
