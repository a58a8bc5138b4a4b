"""What a source file or model folder holds, as a short text: the same content may lie at another place when a run goes on
(a Ray job unpacks its working directory anew each time), but other content is another run."""

from __future__ import annotations

from pathlib import Path

import xxhash

BLOCK = 1 << 20  # bytes
BLOCKS = 64  # read per file: all of a file up to 64 MiB, evenly spaced blocks of a larger one


def fingerprint(source: str) -> str:
    """Of a file's content, or of a folder's files and their names; a hub name stands for itself."""
    path = Path(source)
    if not path.exists():
        return source
    digest = xxhash.xxh3_128()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    for file in files:
        if file != path:
            digest.update(file.name.encode())
        _add(digest, file)
    return str(digest.hexdigest())


def _add(digest: xxhash.xxh3_128, file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "big"))
    stride = max(size // BLOCKS, BLOCK)
    with file.open("rb") as content:
        for start in range(0, size, stride):
            content.seek(start)
            digest.update(content.read(BLOCK))
