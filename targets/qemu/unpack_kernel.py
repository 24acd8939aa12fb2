#!/usr/bin/env python3
"""Turns Debian's self-extracting zImage into an uncompressed uImage.

    unpack_kernel.py VMLINUZ OUT

Under emulation the kernel needs longer to extract itself than for everything else until init.
"""

import lzma
import struct
import sys
import zlib

# The text offset of a kernel for several machines (arch/arm/Makefile), from where `virt` has its memory.
LOAD_ADDRESS = 0x40208000
UIMAGE_MAGIC = 0x27051956
LINUX, ARM, KERNEL, UNCOMPRESSED = 5, 2, 2, 0


def extract(packed: bytes) -> bytes | None:
    """The decompressor itself also holds the magic bytes that the compressed kernel begins with."""
    start = -1
    while (start := packed.find(b"\xfd7zXZ\0", start + 1)) >= 0:
        try:
            return lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(packed[start:])
        except lzma.LZMAError:
            continue
    return None


def main(source: str, target: str) -> None:
    with open(source, "rb") as file:
        packed = file.read()
    image = extract(packed)
    if image is None:
        sys.exit(f"{source} holds no xz-compressed kernel")

    def header(crc: int) -> bytes:
        kinds = (LINUX, ARM, KERNEL, UNCOMPRESSED)
        numbers = (UIMAGE_MAGIC, crc, 0, len(image), LOAD_ADDRESS, LOAD_ADDRESS, zlib.crc32(image))
        return struct.pack(">7I4B32s", *numbers, *kinds, b"linux")

    with open(target, "wb") as file:
        file.write(header(zlib.crc32(header(0))) + image)


if __name__ == "__main__":
    main(*sys.argv[1:])
