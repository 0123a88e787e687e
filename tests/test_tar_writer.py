"""Our tar files are, byte for byte, those that webdataset writes."""

import hashlib
import io

import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from vllava.data.tar_writer import TarWriter

KEYS = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="./_"), min_size=1, max_size=120)
FILES = st.lists(st.tuples(KEYS, st.binary(max_size=1500)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(FILES)
def test_the_bytes_are_those_of_webdatasets_writer(files):
    theirs, ours = io.BytesIO(), io.BytesIO()
    reference = webdataset.TarWriter(theirs, encoder=False, mtime=0, user="vllava", group="vllava")
    writer = TarWriter(ours, "vllava")
    for key, data in files:
        reference.write({"__key__": key, "jpg": data})
        start = writer.add(f"{key}.jpg", data)
        assert ours.getvalue()[start : start + len(data)] == data
    reference.close()
    assert writer.close() == hashlib.sha256(theirs.getvalue()).hexdigest()
    assert ours.getvalue() == theirs.getvalue()
    assert writer.length == len(theirs.getvalue())
