"""nvCOMP's batched codecs on a GPU, through its C interface: asynchronous, in memory that is allocated once.

DEFLATE streams are zlib's in both directions. The others are nvCOMP's own formats: what they write only nvCOMP reads.

Chunks. nvCOMP 6.0 reads DEFLATE chunks up to 2**32 - 1 bytes, so any stream of a CPU encoder that is shorter. Its
header says in one place that chunks to compress may have 2**31 bytes and in another that they must not exceed 65,536;
this module keeps to the smaller number (``MAX_CHUNK_BYTES``), and larger blocks are for the CPU's encoder.

nvCOMP does not promise to survive a damaged stream. Check a record's checksum before it comes here, and leave records
of strangers, whose checksum proves nothing, to ``inflate``. Bytes behind the end of a DEFLATE stream go unnoticed here.
"""

from __future__ import annotations

import ctypes
import enum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError, MissingDependencyError

_REMEDY = "pip install dynamo-kvtc[gpu]"
_MAJOR = 6
_ALIGNMENT = 16
"""At least what any codec asks of a chunk's address; tensors from the GPU's allocator have more."""

_DATA_CHAR, _DATA_USHORT, _DATA_FLOAT16, _DATA_UNKNOWN = 0, 3, 10, 0xFF
_BACKEND_CUDA = 2


class Codec(enum.Enum):
    """The value is the name in nvCOMP's symbols and the data type its options carry.

    ANS codes bytes. ANS_HALF and BITCOMP_HALF take 16-bit numbers, whole ones only: for exact tokens in bfloat16 or
    float16; ANS_HALF models what half precision numbers have in common, BITCOMP_HALF packs bits and is the faster.
    """

    DEFLATE = ("Deflate", None)
    GDEFLATE = ("Gdeflate", None)
    ANS = ("ANS", _DATA_CHAR)
    ANS_HALF = ("ANS", _DATA_FLOAT16)
    BITCOMP_HALF = ("Bitcomp", _DATA_USHORT)


MAX_CHUNK_BYTES = {
    Codec.DEFLATE: 2**16, Codec.GDEFLATE: 2**16, Codec.ANS: 2**24, Codec.ANS_HALF: 2**24, Codec.BITCOMP_HALF: 2**24,
}  # fmt: skip
"""Longest chunk that ``BatchEncoder`` takes."""

MAX_DECODED_BYTES = {
    Codec.DEFLATE: 2**32 - 1, Codec.GDEFLATE: 2**32 - 1, Codec.ANS: 2**25, Codec.ANS_HALF: 2**25,
    Codec.BITCOMP_HALF: 2**25,
}  # fmt: skip
"""Longest chunk, coded or not, that ``BatchDecoder`` takes."""

DEFAULT_EFFORT = 4
"""nvCOMP's level that comes nearest to zlib's 6; 0 (entropy coding alone) is the fastest, 5 the smallest."""


class _Options(ctypes.Structure):
    """Options of compression or decompression, passed by value: 64 bytes whatever the codec, unused ones 0.

    Deflate, Gdeflate: algorithm. ANS: algorithm (0), data type. Bitcomp: algorithm (0), data type, delta, mode
    (0, lossless). To decompress the first field is the backend; ANS has its data type second.
    """

    _fields_ = (
        ("first", ctypes.c_int),
        ("second", ctypes.c_int),
        ("delta", ctypes.c_double),
        ("rest", ctypes.c_char * 48),
    )


class _Alignments(ctypes.Structure):
    _fields_ = (("input", ctypes.c_size_t), ("output", ctypes.c_size_t), ("temp", ctypes.c_size_t))


class _Properties(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32))


_SIZE, _ADDRESS = ctypes.c_size_t, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "CompressGetRequiredAlignments": (_Options, ctypes.POINTER(_Alignments)),
    "DecompressGetRequiredAlignments": (_Options, ctypes.POINTER(_Alignments)),
    "CompressGetTempSize": (_SIZE, _SIZE, _Options, ctypes.POINTER(_SIZE), _SIZE, _ADDRESS),
    "DecompressGetTempSize": (_SIZE, _SIZE, _Options, ctypes.POINTER(_SIZE), _SIZE, _ADDRESS),
    "CompressGetMaxOutputChunkSize": (_SIZE, _Options, ctypes.POINTER(_SIZE)),
    # input addresses, sizes; longest, count, temp and its size; output addresses, sizes; options, statuses, stream
    "CompressAsync": (
        _ADDRESS, _ADDRESS, _SIZE, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _Options, _ADDRESS, _ADDRESS,
    ),
    # input addresses, sizes; room, actual sizes, count, temp and its size; output addresses, options, statuses, stream
    "DecompressAsync": (
        _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _Options, _ADDRESS, _ADDRESS,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """nvCOMP, loaded and of the version whose interface is written here. Raises MissingDependencyError."""
    try:
        from nvidia.libnvcomp import load_library
    except ImportError as exc:
        raise MissingDependencyError(f"nvCOMP is not installed: {_REMEDY}") from exc
    try:
        lib = load_library()
    except OSError as exc:
        raise MissingDependencyError(f"nvCOMP cannot be loaded ({exc}): {_REMEDY}") from exc
    if lib is None:
        raise MissingDependencyError(f"nvCOMP's package holds no library that loads here: {_REMEDY}")
    properties = _Properties()
    try:
        lib.nvcompGetProperties.argtypes = (ctypes.POINTER(_Properties),)
        status = lib.nvcompGetProperties(ctypes.byref(properties))
        for name in {codec.value[0] for codec in Codec}:
            for function, arguments in _SIGNATURES.items():
                getattr(lib, f"nvcompBatched{name}{function}").argtypes = arguments
    except AttributeError as exc:
        raise MissingDependencyError(f"nvCOMP lacks a function ({exc}); version {_MAJOR} is needed: {_REMEDY}") from exc
    if status or properties.version // 1000 != _MAJOR:
        raise MissingDependencyError(
            f"nvCOMP's version is {properties.version / 1000:.1f} (status {status}); {_MAJOR} is needed: {_REMEDY}"
        )
    return lib


class _Batch:
    """What both directions share: the codec's functions and one address and size per chunk, on the device."""

    def __init__(self, codec: Codec, direction: str, options: _Options, chunks: int, longest: int, most: int) -> None:
        if chunks < 1 or not 1 <= longest <= most:
            raise ConfigError(
                f"{chunks} chunks of up to {longest} bytes; {codec.name} takes 1 or more chunks of 1 to {most} bytes"
            )
        self.codec, self.max_chunks, self.max_chunk_bytes = codec, chunks, longest
        self._name, self._options = f"nvcompBatched{codec.value[0]}", options
        self._library = library()
        alignments, temp = _Alignments(), _SIZE()
        self._call(f"{direction}GetRequiredAlignments", options, ctypes.byref(alignments))
        self.input_alignment, self.output_alignment = int(alignments.input), int(alignments.output)
        if max(self.input_alignment, self.output_alignment) > _ALIGNMENT:
            raise MissingDependencyError(
                f"this nvCOMP wants chunks aligned to {max(self.input_alignment, self.output_alignment)} bytes, more "
                f"than {_ALIGNMENT}; use the version named in the package: {_REMEDY}"
            )
        self._call(
            f"{direction}GetTempSize", chunks, longest, options, ctypes.byref(temp), chunks * longest, None
        )  # fmt: skip
        self._temp_bytes = int(temp.value)

    def _allocate(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type != "cuda":
            raise ConfigError(f"nvCOMP works on an NVIDIA GPU; got device {self.device}")
        self._temp = torch.empty(max(self._temp_bytes, 1), dtype=torch.uint8, device=self.device)
        self.device = self._temp.device
        self._from, self._to = (torch.empty(self.max_chunks, dtype=torch.int64, device=self.device) for _ in range(2))

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, self._name + function)(*arguments)
        if status:
            raise MissingDependencyError(
                f"{self._name}{function} failed with nvCOMP status {status}; this needs nvCOMP {_MAJOR} and an NVIDIA "
                f"GPU with a driver that can run it: {_REMEDY}"
            )

    def _addresses(self, source: Tensor, source_start: Tensor, target: Tensor, target_start: Tensor) -> int:
        """Writes both sides' addresses and returns the number of chunks."""
        n = len(source_start)
        if n > self.max_chunks:
            raise ConfigError(f"{n} chunks; this was made for at most {self.max_chunks}")
        for name, x in (("source", source), ("target", target)):
            if x.dtype != torch.uint8 or x.dim() != 1 or not x.is_contiguous() or x.device != self.device:
                raise ConfigError(f"{name} must be uint8 [bytes] on {self.device}, contiguous; got {x.dtype} {x.shape}")
            if x.data_ptr() % _ALIGNMENT:
                raise ConfigError(f"{name} starts at an address that is not a multiple of {_ALIGNMENT}")
        torch.add(source_start, source.data_ptr(), out=self._from[:n])
        torch.add(target_start, target.data_ptr(), out=self._to[:n])
        return n

    def _check(self, n: int, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            dtype = torch.int32 if name == "status" else torch.int64
            if x.dtype != dtype or x.shape != (n,) or x.device != self.device or not x.is_contiguous():
                raise ConfigError(f"{name} must be {dtype} [{n}] on {self.device}, contiguous; got {x.dtype} {x.shape}")

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)


class BatchEncoder(_Batch):
    """Compresses up to ``max_chunks`` chunks of up to ``max_chunk_bytes`` at a time. Its memory is allocated here.

    ``room``: bytes that each chunk's target must have, a multiple of 16. ``effort``: 0 to 5, see DEFAULT_EFFORT;
    DEFLATE and GDEFLATE alone have it. Raises ConfigError, and MissingDependencyError without a working nvCOMP.
    """

    def __init__(
        self, codec: Codec, max_chunks: int, max_chunk_bytes: int, device: torch.device | str = "cuda",
        effort: int = DEFAULT_EFFORT,
    ) -> None:  # fmt: skip
        if not 0 <= effort <= 5:
            raise ConfigError(f"effort is {effort}; nvCOMP has 0 to 5")
        data = codec.value[1]
        options = _Options(effort, 0) if data is None else _Options(0, data)
        super().__init__(codec, "Compress", options, max_chunks, max_chunk_bytes, MAX_CHUNK_BYTES[codec])
        room = _SIZE()
        self._call("CompressGetMaxOutputChunkSize", max_chunk_bytes, options, ctypes.byref(room))
        self.room = -(-int(room.value) // _ALIGNMENT) * _ALIGNMENT
        self._allocate(device)

    def encode(
        self, source: Tensor, source_start: Tensor, source_size: Tensor, target: Tensor, target_start: Tensor,
        target_size: Tensor, status: Tensor,
    ) -> None:  # fmt: skip
        """Asynchronous, on the current stream.

        source, target: uint8 [bytes] on the GPU, starting at a multiple of 16. source_start, source_size,
        target_start: int64 [N] on the GPU; sizes 1 to max_chunk_bytes; starts of targets multiples of 16, with ``room``
        bytes behind each, and starts of sources multiples of ``input_alignment`` (1 for DEFLATE, 2 for BITCOMP_HALF, 16
        for ANS): the caller's promise. Written: target_size int64 [N], status int32 [N], 0 where a chunk succeeded.
        """
        self._check(len(source_start), source_start=source_start, source_size=source_size, target_start=target_start,
                    target_size=target_size, status=status)  # fmt: skip
        n = self._addresses(source, source_start, target, target_start)
        if n:
            with torch.cuda.device(self.device):
                self._call(
                    "CompressAsync", self._from.data_ptr(), source_size.data_ptr(), self.max_chunk_bytes, n,
                    self._temp.data_ptr(), self._temp_bytes, self._to.data_ptr(), target_size.data_ptr(),
                    self._options, status.data_ptr(), self._stream(),
                )  # fmt: skip


class BatchDecoder(_Batch):
    """Decompresses up to ``max_chunks`` chunks that give up to ``max_chunk_bytes`` each."""

    def __init__(
        self, codec: Codec, max_chunks: int, max_chunk_bytes: int, device: torch.device | str = "cuda"
    ) -> None:
        ans = codec.value[0] == "ANS"
        # Named, so that no other GPU's decompression engine decides what a damaged stream does.
        options = _Options(_BACKEND_CUDA, _DATA_UNKNOWN if ans else 0)
        super().__init__(codec, "Decompress", options, max_chunks, max_chunk_bytes, MAX_DECODED_BYTES[codec])
        self._allocate(device)

    def decode(
        self, source: Tensor, source_start: Tensor, source_size: Tensor, target: Tensor, target_start: Tensor,
        target_room: Tensor, target_size: Tensor, status: Tensor,
    ) -> None:  # fmt: skip
        """Asynchronous, on the current stream.

        Arguments as in ``BatchEncoder.encode``; target_room: int64 [N], bytes that each chunk must give; starts of
        sources multiples of ``input_alignment`` (4 for DEFLATE, 8 for BITCOMP_HALF, 16 for ANS). Written: target_size
        int64 [N], status int32 [N]. A chunk is good if its status is 0 and its target_size equals target_room.
        """
        self._check(len(source_start), source_start=source_start, source_size=source_size, target_start=target_start,
                    target_room=target_room, target_size=target_size, status=status)  # fmt: skip
        n = self._addresses(source, source_start, target, target_start)
        if n:
            with torch.cuda.device(self.device):
                self._call(
                    "DecompressAsync", self._from.data_ptr(), source_size.data_ptr(), target_room.data_ptr(),
                    target_size.data_ptr(), n, self._temp.data_ptr(), self._temp_bytes, self._to.data_ptr(),
                    self._options, status.data_ptr(), self._stream(),
                )  # fmt: skip
