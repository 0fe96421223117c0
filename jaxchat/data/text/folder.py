"""Folders of text: which of their files are for training and which for validation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath

from jaxchat.data.manifest import FILE_NAME, pinned_shard, recorded_shards
from jaxchat.data.text import plain
from jaxchat.data.text.forms import bare_name, form_of, read_head, something_else
from jaxchat.data.text.listing import OTHER_DATA, LeftOut, Listing, is_run, list_text, role_in, text_folder
from jaxchat.data.text.names import is_about
from jaxchat.data.text.reading import OnBad, Unreadable, check_damage, open_parquet
from jaxchat.data.text.remedies import convert
from jaxchat.data.text.shards import TextFiles, iterate_texts, known_form
from jaxchat.errors import UserError, check, closest
from jaxchat.storage import AnyPath, is_folder, size_of, storage_errors, to_path

# Of text without a file for validation, one document in this many is for it: the first number that leaves documents on
# both sides.
HOLD_OUT = (50, 25, 12, 6, 3, 2)
_LEAST_CHARS = 40  # of a document of a file that is all the text there is
_THREADS = 16  # that look at files; in cloud storage each look takes a while


@dataclass(frozen=True)
class TextSplits:
    """The two sides of a text folder.

    Attributes:
      train, val: the sides.
      folder: where the files are.
      how_split: what decided which files are for validation, as a clause of a sentence.
      left_out: what else is in the folder, and why it is not read.
    """

    train: TextFiles
    val: TextFiles
    folder: AnyPath
    how_split: str
    left_out: tuple[LeftOut, ...] = ()


def find_text(
    data_dir: AnyPath | str,
    val_shard: str | None = None,
    *,
    on_bad: OnBad = "refuse",
    say: Callable[[str], None] = print,
) -> TextSplits:
    """Finds the text in a folder, or in `pretrain/` inside it, and splits it into training and validation.

    Files are listed by `list_text` and sorted by their paths. Validation gets the one that `val_shard` names (with or
    without its endings), else the one that the folder's manifest pins, which is never trained on, else those whose
    names state it (see `role_of`), else those that are called test, else the last that has text and is not called
    train. Text in one file, or in sub-folders whose names state nothing, has no last file: about every 50th document is
    for validation. Files called test are never trained on, nor are those called validation.

    Args:
      on_bad, say: as in `TextFiles`.

    Raises:
      UserError: there is no such folder, no text in it, a table that is called train or validation but must be
        converted, a parquet file without a column `text` or with several, a `val_shard` or pinned shard that is
        missing, nothing to train on or validate with, a single document, or a damaged manifest; with `on_bad="refuse"`
        also a file that is not what its name says, and a shard that the manifest lists and the folder lacks.
    """
    given = to_path(data_dir)
    check(is_folder(given) or given.exists(), f"data folder {given} does not exist")
    check(given.is_dir(), f"{given} is not a folder")
    check(
        not is_run(given), f"{given} is the directory of a run, not of data; what it generated is in {given / 'data'}"
    )
    folder = text_folder(given)
    try:
        listing = list_text(folder)
    except storage_errors() as error:
        check_damage(folder, error)
        raise
    _check_any(listing)
    if folder != given:
        listing.left_out += _beside(given)
    sides = partial(TextFiles, on_bad=on_bad, say=say)
    pinned = pinned_shard(folder)
    if pinned is not None:
        check(
            pinned in listing.texts,
            f"{pinned}, which {FILE_NAME} names as the validation shard, is missing; 'jaxchat data get' downloads it",
        )
        listing.texts = sorted({*listing.texts, *recorded_shards(folder)})
    _check_contents(listing, on_bad, say)
    return _split(listing, pinned, val_shard, sides)


def _beside(data_dir: AnyPath) -> list[LeftOut]:
    """The text in a data folder whose text is in its `pretrain/`."""
    why, known = "beside pretrain/, which has the text", ("pretrain", *OTHER_DATA)
    try:
        found = [path for path in sorted(data_dir.iterdir()) if not path.name.startswith(".")]
        texts = [path.name for path in found if path.is_file() and form_of(path) and path.name != FILE_NAME]
        folders = [path.name + "/" for path in found if path.is_dir() and path.name not in known]
    except storage_errors():
        return []
    return [LeftOut(f"../{name}", why) for name in (*texts, *folders)]


def _check_any(listing: Listing) -> None:
    folder, roles = listing.folder, {path: role_in(listing, path) for path in listing.tables}
    named = [path for path, role in roles.items() if role in ("train", "val")]
    if listing.tables and (named or all(is_about(bare_name(path)) for path in listing.texts)):
        table = (named or listing.tables)[0]
        why = next(entry.why for entry in listing.left_out if entry.name == listing.name(table))
        raise UserError(f"{table}: {why}; convert it with: {convert(table)}")
    if not listing.texts:
        names = sorted(path.name for path in folder.iterdir())
        contents = f"it contains {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"
        whys = [f"{name}: {why}" for name, why in listing.left_out[:3] if why != "not text"]
        contents += f" ({'; '.join(whys)})" if whys else ""
        plain_text = "not text" in (why for _, why in listing.left_out)
        remedy = ", and rename to .txt what is plain text" if plain_text else ""
        raise UserError(f"no text in {folder}; {contents}; put .parquet, .jsonl or .txt files there{remedy}")


def _check_contents(listing: Listing, on_bad: OnBad, say: Callable[[str], None]) -> None:
    """Checks that the files are what their names say, and leaves out those that are not, or refuses them."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(listing.texts, pool.map(partial(why_not, on_bad=on_bad), listing.texts), strict=True)
        whys = {path: why for path, why in found if why is not None}
    for path, why in whys.items():
        check(on_bad == "skip", f"{path} {why}; --data.on-bad=skip leaves it out")
        say(f"{path} {why}; left out")
    listing.leave_out(whys)


def why_not(path: AnyPath, on_bad: OnBad = "refuse") -> str | None:
    """Why a file is not what its name says, and what to do about it; None if it may well be.

    Raises:
      UserError: a parquet file without a column `text`; with `on_bad="refuse"` also one that is damaged or missing.
    """
    form = known_form(path)
    if form.format == "parquet":
        _open_checked(path, on_bad)
    elif not form.compression:
        try:
            return something_else(path, read_head(path))
        except storage_errors() as error:
            check_damage(path, error)
            raise
    return None


def _open_checked(path: AnyPath, on_bad: OnBad) -> None:
    try:
        open_parquet(path)
    except Unreadable as error:
        remedy = "; 'jaxchat data get' downloads it" if error.kind == "missing_files" else ""
        check(on_bad == "skip", f"{error}{remedy}; --data.on-bad=skip leaves out files that are for training")


# --- splitting --------------------------------------------------------------------------------------------------------


def _split(
    listing: Listing, pinned: AnyPath | None, val_shard: str | None, sides: Callable[[tuple[AnyPath, ...]], TextFiles]
) -> TextSplits:
    roles = {path: role_in(listing, path) for path in listing.texts}
    trained = [path for path in listing.texts if roles[path] not in ("val", "test") and path != pinned]
    named = None if val_shard is None else _find_named(val_shard, listing)
    if named is not None and listing.texts != [named]:
        val, how = [named], "as --data.val-shard says"
    elif pinned is not None and named is None:
        val, how = [pinned], f"as {FILE_NAME} says"
    elif named is not None:
        return _hold_out(listing, (named,), sides)
    else:
        val, how = _called_validation(listing, roles, sides)
        if not val:
            _check_training(listing, trained, pinned)
            is_tree = any(path.parent != listing.folder for path in trained)
            in_order = sorted(trained, key=lambda path: (roles[path] is None, path))  # not one that is called train
            while not is_tree and len(in_order) > 1 and not _can_validate(in_order[-1], sides):
                listing.leave_out({in_order.pop(): "no text"})
            if is_tree or len(in_order) == 1:
                return _hold_out(listing, tuple(sorted(in_order)), sides)
            val, how = in_order[-1:], "the last file"
    left = {*listing.texts}.difference(val)
    trained = [path for path in trained if path in left]
    _check_training(listing, trained, pinned)
    names = ", ".join(listing.name(path) for path in val)
    check(
        any(_can_validate(path, sides) for path in val),
        f"{names} in {listing.folder} has no text, so it cannot be for validation",
    )
    check(_has_text(sides(tuple(trained))), f"there is no text to train on in {listing.folder}, only in {names}")
    unused = sorted(left.difference(trained))
    kept = f"kept for validation by {FILE_NAME}"
    why = {path: kept if path == pinned else f"called {roles[path]}" for path in unused}
    listing.leave_out({path: f"{why[path]}, so never trained on" for path in unused})
    return TextSplits(
        sides(tuple(trained)), sides(tuple(val)), listing.folder, how, tuple(listing.left_out + _rowless(listing))
    )


def _called_validation(listing: Listing, roles, sides) -> tuple[list[AnyPath], str]:
    """The files that are called validation, or else test, and have text."""
    for role, how in (("val", "by name"), ("test", "by name, since nothing else is called validation")):
        named = [path for path, stated in roles.items() if stated == role]
        found = [path for path in named if _can_validate(path, sides)]
        listing.leave_out(dict.fromkeys({*named}.difference(found), "no text"))
        if found:
            return found, how
    return [], ""


def _find_named(val_shard: str, listing: Listing) -> AnyPath:
    """The file that `val_shard` names: its path in the folder, its name, or either without endings."""
    ways = (
        listing.name,
        lambda path: path.name,
        lambda path: path.name.split(".", 1)[0],
        bare_name,
        lambda path: PurePath(listing.name(path)).with_name(bare_name(path)).as_posix(),
    )
    for names in ways:
        found = [path for path in listing.texts if names(path) == val_shard]
        if found:
            several = ", ".join(listing.name(path) for path in found)
            same_folder = len({path.parent for path in found}) == 1
            check(same_folder, f"validation shard {val_shard!r} is any of {several}; write one of these")
            return found[0]
    near = closest(val_shard, [listing.name(path) for path in listing.texts])
    raise UserError(f"validation shard {val_shard!r} is not in {listing.folder}{near}")


def _check_training(listing: Listing, trained: list[AnyPath], pinned: AnyPath | None) -> None:
    if trained:
        return
    names = ", ".join(listing.name(path) for path in listing.texts[:3])
    if pinned is not None:
        raise UserError(
            f"{listing.folder} contains no text for training, only {pinned.name} for validation; 'jaxchat data get' "
            "downloads more"
        )
    raise UserError(
        f"{listing.folder} contains no text for training: {names} is for validation or test by name; add a file, or "
        "rename it"
    )


def _can_validate(path: AnyPath, sides: Callable[[tuple[AnyPath, ...]], TextFiles]) -> bool:
    """Whether a file has text. Damage is not left out of validation: a score must be of the same text every time."""
    if known_form(path).format == "parquet":
        _open_checked(path, "refuse")
    return _has_text(sides((path,)))


def _has_text(side: TextFiles) -> bool:
    return any(text.strip() for text in iterate_texts(replace(side, say=lambda line: None)))


def _rowless(listing: Listing) -> list[LeftOut]:
    """Files of parquet without rows. They stay where they are in the order of the files: each is an empty block."""
    found = []
    for path in listing.texts:
        try:
            if known_form(path).format == "parquet" and open_parquet(path).metadata.num_rows == 0:
                found.append(LeftOut(listing.name(path), "no rows"))
        except Unreadable:
            pass  # reported when it is read
    return found


def _hold_out(
    listing: Listing, files: tuple[AnyPath, ...], sides: Callable[[tuple[AnyPath, ...]], TextFiles]
) -> TextSplits:
    """Both sides of the same files. A file that is all the text there is is cut finely enough for that."""
    side = sides(files)
    check(_has_text(side), f"{files[0] if len(files) == 1 else listing.folder} contains no text")
    for chars in _document_lengths(files):
        for modulus in HOLD_OUT:
            train = replace(side, hold_out=modulus, document_chars=chars)
            val = replace(train, held_out=True)
            if _has_text(train) and _has_text(val):
                how = f"one in {modulus} documents"
                return TextSplits(train, val, listing.folder, how, tuple(listing.left_out + _rowless(listing)))
    raise UserError(f"{files[0]} has too few documents to keep one for validation; add a second file")


def _document_lengths(files: tuple[AnyPath, ...]) -> list[int | None]:
    """The values of `document_chars` to try, in order."""
    forms = [known_form(path) for path in files]
    if len(files) >= HOLD_OUT[0] or any(form.format != "txt" for form in forms):
        return [None]
    sizes = (size_of(path) * (4 if form.compression else 1) for path, form in zip(files, forms, strict=True))
    size = sum(sizes)
    finer = max(_LEAST_CHARS, min(size // 100, plain.DOCUMENT_CHARS))
    enough = plain.LONG_FILE_BYTES if len(files) == 1 else 100 * plain.DOCUMENT_CHARS
    return [None, finer, _LEAST_CHARS] if size > enough else [finer, _LEAST_CHARS]
