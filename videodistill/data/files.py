"""Reading and writing of annotation files, with errors that name the file and the remedy."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from videodistill.data.record import Stretch
from videodistill.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it exists either whole or not at all.

    What a killed run leaves behind (``.<name>.tmp`` beside the target) is overwritten by the next
    attempt.
    """
    if isinstance(content, str):
        content = content.encode()
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def clear_errors(out: Path) -> Iterator[None]:
    """Turn what the file system refuses, or a killed worker, into one line.

    Args:
        out: The folder that is written, by a command that goes on where it stopped.

    Raises:
        UserError: In place of an OSError or a BrokenProcessPool.
    """
    try:
        yield
    except OSError as error:
        remedy = "choose another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space and run the same command again, it goes on where it stopped"
        raise UserError(f"{error.filename or out}: {error.strerror or error}; {remedy}") from error
    except BrokenProcessPool as error:
        raise UserError(
            f"{out}: a worker was killed, perhaps for lack of memory; run the same command again "
            "with fewer --workers, it goes on where it stopped"
        ) from error


def to_json(value: list | dict) -> str:
    """JSON with one line for each entry of a list or a dict."""
    if isinstance(value, list):
        brackets, lines = "[]", [json.dumps(entry) for entry in value]
    else:
        brackets = "{}"
        lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
    return "\n".join([brackets[0], ",\n".join(lines), brackets[1]]) + "\n"


def read_json(path: Path, kind: type[list] | type[dict]) -> Any:
    """The list or dict that a JSON file holds.

    Raises:
        UserError: The file cannot be read, is not JSON (with the line), or holds another type.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(value, kind):
        wanted = "list" if kind is list else "object"
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where a {wanted} is expected")
    return value


def read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(Line number, cells by column name) of each row of a csv file; cells are stripped.

    Raises:
        UserError: The file cannot be read, lacks one of ``columns``, or a row has too many or too
            few cells.
    """
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(f"{path}:1: no column {', '.join(missing)}; it has {', '.join(header)}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(cells)} cells where the first line names "
                    f"{len(header)} columns"
                )
            yield reader.line_num, dict(zip(header, map(str.strip, cells), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid csv ({error})") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def stretches(value: Any, where: str) -> tuple[Stretch, ...]:
    """((start, end), ...) of a JSON list of pairs of seconds.

    Raises:
        UserError: It is anything else; the message begins with ``where``.
    """
    try:
        pairs = tuple((float(start), float(end)) for start, end in value)
    except (TypeError, ValueError):
        pairs = None
    if pairs is None or not all(0 <= start <= end for start, end in pairs):
        raise UserError(f"{where}: {value!r} is not a list of [start, end] in seconds")
    return pairs
