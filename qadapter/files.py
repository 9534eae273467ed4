"""Writing files so that a failure leaves nothing half-written."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``directory`` whose files move there when the block succeeds.

    Files of the same name are replaced one by one, others stay. If the block fails, the temporary
    folder is removed, ``directory`` is as it was, and an OSError says what could not be saved.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"cannot save to {target}: it is a file, expected a folder")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        if not target.exists():
            os.chmod(temporary, 0o777 & ~_umask())
            temporary.rename(target)
        else:
            for item in sorted(temporary.iterdir()):
                if item.is_dir() and (target / item.name).is_dir():
                    shutil.rmtree(target / item.name)
                os.replace(item, target / item.name)
    except Exception as error:
        raise OSError(f"could not save to {target}, which is left as it was: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, same suffix, that takes its place on success."""
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except Exception as error:
        raise OSError(f"could not write {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
