"""Reading and writing of annotation files, with errors that name the file and the remedy."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken
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


def sync(path: Path) -> None:
    """Have the system write out a file or folder, so that no rename is on disk before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_json(path: Path, kind: type[list] | type[dict], without: str | None = None) -> Any:
    """The list or dict that a JSON file holds.

    Args:
        path: The file.
        kind: Which of the two.
        without: A key to leave out of every object, for the sake of memory.

    Raises:
        UserError: The file cannot be read, is not JSON (with the line), gives a key twice in one
            object, or holds another type.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise UserError(f"{path}: {key!r} is given twice in one object: drop one of them")
        value.pop(without, None)
        return value

    try:
        value = json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(value, kind):
        wanted = "list" if kind is list else "object"
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where a {wanted} is expected")
    return value


def read_entries(path: Path, broken: list[Broken] | None = None) -> Iterator[tuple[str, Any]]:
    """(Where, value) of each entry of a JSON list, or of each line of a file named .jsonl.

    Args:
        path: The file.
        broken: Takes lines that are not JSON; without it they are raised.

    Raises:
        UserError: The file cannot be read, or is not JSON.
    """
    if path.suffix != ".jsonl":
        for number, value in enumerate(read_json(path, list), start=1):
            yield f"{path}: entry {number}", value
        return
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{path}:{number}: not valid JSON ({error.msg})"
            if broken is None:
                raise UserError(message) from None
            broken.append(Broken(message))
            continue
        yield f"{path}:{number}", value


def number_in(where: str) -> str:
    """The number of the entry or line that a place of `read_entries` names."""
    return where.rpartition(":")[2].removeprefix(" entry ")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped of surrounding white space."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_rows(
    path: Path, columns: tuple[str, ...], broken: list[Broken] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(Line number, cells by column name) of each row of a csv file; cells are stripped.

    Args:
        path: The file.
        columns: Those that must be there.
        broken: Takes rows with too many or too few cells; without it they are raised.

    Raises:
        UserError: The file cannot be read, is not csv, lacks one of ``columns``, or has a row with
            too many or too few cells.
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
                message = (
                    f"{path}:{reader.line_num}: {len(cells)} cells where the first line names "
                    f"{len(header)} columns"
                )
                if broken is None:
                    raise UserError(message)
                broken.append(Broken(message))
                continue
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
