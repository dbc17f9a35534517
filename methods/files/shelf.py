"""Small files that people name and share, in one folder of theirs, beside those that the pack carries."""

import re
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,99}")


def plain_name(name: str, suffix: str, what: str) -> str:
    """The name without its suffix. ValueError for what is no plain file name; what: it is called in the sentence."""
    plain = name.removesuffix(suffix)
    if not NAME.fullmatch(plain) or ".." in plain or plain != plain.strip() or plain.endswith("."):
        raise ValueError(
            f"The {what} {name!r} must be up to 100 letters, digits, spaces, dots, - or _, beginning with a letter or "
            "a digit, without a folder."
        )
    return plain


def names(folder: Path, suffix: str) -> list[str]:
    """Of the files in this very folder, sorted; links that lead out of it are left out."""
    found = folder.glob(f"*{suffix}") if folder.is_dir() else ()
    here = folder.resolve()
    return sorted(p.name for p in found if p.is_file() and NAME.fullmatch(p.stem) and p.resolve().parent == here)


def free(folder: Path, name: str, suffix: str) -> Path:
    """The first path name_00001, name_00002 ... that no file has."""
    numbered = (folder / f"{name}_{n:05d}{suffix}" for n in range(1, 100000))
    found = next((path for path in numbered if not path.exists()), None)
    if found is None:
        raise ValueError(f"{folder} holds 99,999 files named {name}_…; choose another filename.")
    return found


@dataclass(frozen=True)
class Shelf:
    """The user's own folder, which goes first, and the one that the pack carries."""

    own: Path
    carried: Path
    suffix: str

    def names(self) -> list[str]:
        return sorted({*names(self.own, self.suffix), *names(self.carried, self.suffix)})

    def folder(self, name: str) -> Path:
        """Where the file of that name lies; the user's own folder for one that is nowhere."""
        carried = name in names(self.carried, self.suffix) and name not in names(self.own, self.suffix)
        return self.carried if carried else self.own
