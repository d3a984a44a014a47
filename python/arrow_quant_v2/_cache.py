"""A folder of results that cost time, found by the hash of all that they depend on.

An entry is two files, KEY.SUFFIX and KEY.json: the payload, and what it was made from with the payload's SHA-256. Both are written aside and renamed. What
does not fit its manifest is refused with the reason, never used and never repaired in silence.
"""

import hashlib
import json
import os
import tempfile

from ._core import FormatError, __version__, file_sha256

__all__ = ["Cache"]

SCHEMA = "arrowquant.cache/1"
SUFFIXES = ("aqcal", "npz")


class Cache:
    """folder: made when the first entry is stored. `parts` of a key: names and JSON values of all that the result depends on; the version is one of them."""

    def __init__(self, folder):
        self.folder = os.fspath(folder)

    def find(self, parts, suffix):
        """Path of the payload, or None when there is no entry. FormatError when there is one that cannot be trusted."""
        inputs, key = keyed(parts)
        manifest, payload = self._path(key, "json"), self._path(key, suffix)
        if not os.path.exists(manifest) and not os.path.exists(payload):
            return None
        try:
            with open(manifest, encoding="utf-8") as file:
                said = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise refused(manifest, f"it is damaged: its manifest cannot be read ({error})") from None
        if not isinstance(said, dict) or said.get("schema") != SCHEMA:
            raise refused(manifest, "it is foreign: this is no manifest of a calibration cache")
        if said.get("inputs") != inputs:
            raise refused(manifest, "it is foreign: it was made from other data, another model or other options")
        if not os.path.exists(payload):
            raise refused(payload, "it is damaged: the file is missing")
        if file_sha256(payload) != said.get("sha256"):
            raise refused(payload, "it is damaged: its SHA-256 is not that of its manifest")
        return payload

    def store(self, parts, suffix, write):
        """Stores what write(path) writes, and returns its path."""
        inputs, key = keyed(parts)
        os.makedirs(self.folder, exist_ok=True)
        payload = self._path(key, suffix)
        with tempfile.TemporaryDirectory(prefix=".store-", dir=self.folder) as aside:
            fresh = os.path.join(aside, "payload." + suffix)
            write(fresh)
            manifest = os.path.join(aside, "manifest.json")
            with open(manifest, "w", encoding="utf-8") as file:
                json.dump({"schema": SCHEMA, "sha256": file_sha256(fresh), "inputs": inputs}, file, indent=1, sort_keys=True)
            os.replace(fresh, payload)
            os.replace(manifest, self._path(key, "json"))
        return payload

    def clear(self):
        """Removes the entries; other files of the folder stay."""
        if not os.path.isdir(self.folder):
            return
        for name in sorted(os.listdir(self.folder)):
            stem, _, suffix = name.rpartition(".")
            if suffix in ("json", *SUFFIXES) and len(stem) == 64 and set(stem) <= set("0123456789abcdef"):
                os.unlink(os.path.join(self.folder, name))

    def _path(self, key, suffix):
        return os.path.join(self.folder, f"{key}.{suffix}")


def keyed(parts):
    """What the entry was made from, in the form that JSON gives back, and its hash."""
    inputs = json.loads(json.dumps({"version": __version__, **parts}, sort_keys=True))
    return inputs, hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def refused(path, reason):
    error = FormatError(f"{path}: the cache entry is refused: {reason}. Hint: remove it, or clear the cache")
    error.file = path
    return error
