"""Blockwise quantization: numbers in blocks, each divided by its largest magnitude, then rounded to the nearest
entry of a codebook (Dettmers et al. 2021, arXiv:2110.02861).

Codebooks: ``nf4``, 16 quantiles of a normal distribution, two codes a byte (Dettmers et al. 2023, arXiv:2305.14314,
appendix E); ``signed`` and ``unsigned``, the 256 numbers of dynamic quantization, whose precision grows with their
size (arXiv:2110.02861, section 2.1).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 26


def chunk(device: torch.device) -> int:
    """Numbers worked on at once: what is in between stays in a CPU's cache, and memory stays bounded."""
    return _ON_CPU if device.type == "cpu" else _ELSEWHERE


class Codebook(NamedTuple):
    """The numbers that codes stand for, and the tables for both ways."""

    values: Tensor
    """fp32, ascending."""
    middles: Tensor
    """Between each value and the next; infinity after the last."""
    lowest: Tensor
    """For the upper 16 bits of a float32, the code of the smallest number that begins with them (uint8, [65536])."""
    decoded: Tensor
    """What a byte stands for: its number (fp32, [256]), or the bits of its two numbers (int64, [256])."""
    in_byte: int
    """Codes in a byte; of two the first is in the upper half."""

    def nearest(self, x: Tensor) -> Tensor:
        """Codes (uint8, one a byte) of fp32 numbers in [-1, 1].

        At most one middle lies between numbers of equal upper bits: one comparison says whether it is passed. This
        takes a tenth of a binary search.
        """
        code = self.lowest.index_select(0, (x.view(torch.int32) >> 16) & 0xFFFF)
        return code + (x > self.middles.index_select(0, code.int()))

    def numbers(self, packed: Tensor) -> Tensor:
        """What bytes stand for, fp32."""
        return self.decoded.index_select(0, packed.int()).view(torch.float32)


_MADE: dict[tuple[str, torch.device], Codebook] = {}  # torch.compile looks through a functools.lru_cache


def codebook(name: str, device: torch.device) -> Codebook:
    """The codebook of that name, on that device."""
    if (name, device) not in _MADE:
        _MADE[name, device] = _codebook(name, device)
    return _MADE[name, device]


def _codebook(name: str, device: torch.device) -> Codebook:
    values_K = torch.tensor(NF4) if name == "nf4" else _dynamic(name == "signed")
    middles_K = torch.cat([(values_K[1:] + values_K[:-1]) / 2, torch.tensor([torch.inf])])
    bits = torch.arange(1 << 16, dtype=torch.int32)
    smallest = torch.where(bits < 1 << 15, bits, bits + 1) << 16  # of negative ones it is the next in size
    lowest = torch.bucketize(smallest.view(torch.float32).nan_to_num(), middles_K[:-1]).to(torch.uint8)
    in_byte = 2 if len(values_K) == 16 else 1
    pairs = torch.cartesian_prod(values_K, values_K).contiguous().view(torch.int64).flatten()
    decoded = pairs if in_byte == 2 else values_K
    return Codebook(values_K.to(device), middles_K.to(device), lowest.to(device), decoded.to(device), in_byte)


def _dynamic(signed: bool) -> Tensor:
    """Seven decades; each has twice the numbers of the one below, in the middles of equal parts of it."""
    decades = []
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        decades.append((bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (i - 6))
    above = torch.cat(decades)
    return torch.cat([-above if signed else above[:0], above, torch.tensor([0.0, 1.0])]).sort().values


def encode(x: Tensor, name: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8, flat, packed) and each block's largest magnitude (fp32); ``block`` is a power of two."""
    book, flat = codebook(name, x.device), x.detach().flatten()
    codes, largest = [], []
    for part in torch.split(flat, chunk(x.device)):
        x_NB = _blocks(part.float(), block)
        largest.append(x_NB.abs().amax(1))
        scaled_NB = x_NB / torch.where(largest[-1] == 0, 1.0, largest[-1])[:, None]
        code = book.nearest(scaled_NB.flatten())[: -(-len(part) // book.in_byte) * book.in_byte]
        codes.append(code[::2] << 4 | code[1::2] if book.in_byte == 2 else code)
    return torch.cat(codes), torch.cat(largest)


def _blocks(x: Tensor, block: int) -> Tensor:
    """As rows; a copy only if the last one has to be filled up with zeros."""
    short = -len(x) % block
    return (pad(x, (0, short)) if short else x).view(-1, block)


def decode(
    codes: Tensor, largest: Tensor, name: str, block: int, count: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The ``count`` numbers, flat, that :func:`encode` made codes of."""
    book = codebook(name, codes.device)
    out = torch.empty(count, dtype=dtype, device=codes.device)
    size = chunk(codes.device)
    pieces = ((out, size), (codes, size // book.in_byte), (largest, size // block))
    for part, code, scale_N in zip(*(torch.split(*piece) for piece in pieces), strict=True):
        x_NB = _blocks(book.numbers(code), block)
        part.copy_(x_NB.mul_(scale_N[:, None]).flatten()[: len(part)])
    return out
