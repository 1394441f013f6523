"""The example loader: what each format gives, and what happens to files that cannot be read."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from folder_loader import FolderLoader
from pypdf import PdfWriter

HANDBOOK = Path(__file__).parents[2] / "examples" / "documents"
PDF = HANDBOOK / "en" / "speed-and-memory.pdf"


def load(folder, **files):
    """Write `name_suffix="text"` files and give what the loader makes of them."""
    for name, text in files.items():
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name.replace("_", ".")).write_bytes(data)
    loader = FolderLoader(folder)
    return loader.load(), loader


def test_text_and_markdown_come_as_they_are(tmp_path):
    documents, _ = load(tmp_path, a_md="\ufeff# Title\n\nText.\n", b_txt="第一行\r\n第二行")
    assert [d.page_content for d in documents] == ["# Title\n\nText.\n", "第一行\n第二行"]
    assert [d.metadata for d in documents] == [{"source": "a.md"}, {"source": "b.txt"}]


def test_csv_gives_a_document_per_row(tmp_path):
    table = '\ufeffcode,text,\nE-1,"two\nlines",\n\nE-2,,loose,more\n'
    documents, _ = load(tmp_path, a_csv=table)
    assert [d.page_content for d in documents] == [
        "code: E-1\ntext: two\nlines",
        "code: E-2\nloose\nmore",
    ]
    assert [d.metadata["row"] for d in documents] == [1, 3]


@pytest.mark.parametrize(
    ("table", "texts"),
    [
        ("name;price\nplum;1,20\n", ["name: plum\nprice: 1,20"]),
        ("\ufeffname;price\r\nplum;1,20\r\n", ["name: plum\nprice: 1,20"]),
        ("name\tprice, each\tkind\nplum\t1\t2\n", ["name: plum\nprice, each: 1\nkind: 2"]),
        ('name,"a;b;c"\nplum,1;2;3\n', ["name: plum\na;b;c: 1;2;3"]),
        ("name\nplum; ripe\n", ["name: plum; ripe"]),
    ],
)
def test_csv_of_other_delimiters(tmp_path, table, texts):
    documents, _ = load(tmp_path, a_csv=table)
    assert [d.page_content for d in documents] == texts


LINES = '\ufeff{"name": "x", "in": {"y": 1}}\n\n"plain"\n[1, 2]\n'


@pytest.mark.parametrize("name", ["a_jsonl", "a_json"])
def test_json_lines_give_a_document_per_line(tmp_path, name):
    documents, loader = load(tmp_path, **{name: LINES})
    assert loader.failed == {}
    assert [(d.page_content, d.metadata["row"]) for d in documents] == [
        ("name: x\nin: y: 1", 1),
        ("plain", 3),
        ("[1, 2]", 4),
    ]


def test_json_gives_a_document_per_list_item(tmp_path):
    items = [{"term": "召回率", "n": 3, "see": ["a", "b"], "none": None}, "plain", 7, {}]
    documents, _ = load(tmp_path, a_json=json.dumps(items), b_json='{"name": "x", "in": {"y": 1}}')
    assert [(d.page_content, d.metadata.get("pointer")) for d in documents] == [
        ('term: 召回率\nn: 3\nsee: ["a", "b"]', "/0"),
        ("plain", "/1"),
        ("7", "/2"),
        ("name: x\nin: y: 1", None),
    ]


def test_html_gives_its_title_and_its_visible_text(tmp_path):
    page = """<?xml version="1.0"?><html><head><title> A
      page </title><style>p {}</style></head><body><!-- no --><h1>Head</h1><p>One <b>bold</b>
      word,<br>broken.</p><table><tr><th>k</th><th>v</th></tr><tr><td>1</td><td>2</td></tr></table>
      <script>alert(1)</script></body></html>"""
    documents, _ = load(tmp_path, a_html=page)
    assert documents[0].page_content == (
        "# Head\n\nOne bold\nword,  \nbroken.\n\n| k | v |\n| --- | --- |\n| 1 | 2 |"
    )
    assert documents[0].metadata == {"source": "a.html", "title": "A page"}


WORD = '<w:{} xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">{}</w:{}>'
BODY = """<w:body><w:p><w:pPr><w:pStyle w:val="h"/></w:pPr><w:r><w:t>Head</w:t></w:r></w:p>
<w:p><w:r><w:t>One </w:t></w:r><w:r><w:rPr><w:b/></w:rPr><w:t>bold 词</w:t></w:r></w:p>
<w:tbl><w:tr><w:tc><w:p><w:r><w:t>k</w:t></w:r></w:p></w:tc>
<w:tc><w:p><w:r><w:t>v</w:t></w:r></w:p></w:tc></w:tr></w:tbl></w:body>"""
STYLE = '<w:style w:type="paragraph" w:styleId="h"><w:name w:val="heading 1"/></w:style>'


def docx(body=BODY):
    """A document of Word's, as small as they come."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", WORD.format("document", body, "document"))
        archive.writestr("word/styles.xml", WORD.format("styles", STYLE, "styles"))
    return file.getvalue()


def test_docx_gives_headings_paragraphs_and_tables(tmp_path):
    documents, loader = load(tmp_path, a_docx=docx())
    assert loader.failed == {}
    assert documents[0].page_content.startswith("# Head\n\nOne bold 词\n\n| ")
    assert "| k | v |" in documents[0].page_content
    assert documents[0].metadata == {"source": "a.docx"}


def test_html_encoding_is_read_from_the_page(tmp_path):
    page = '<meta charset="gbk"><p>检索</p>'.encode("gbk")
    documents, _ = load(tmp_path, a_htm=page)
    assert documents[0].page_content == "检索"


def test_pdf_gives_a_document_per_page(tmp_path):
    documents, _ = load(tmp_path, a_pdf=PDF.read_bytes())
    assert [d.metadata for d in documents] == [{"source": "a.pdf", "page": n} for n in (1, 2, 3)]
    assert "padding costs as" in documents[0].page_content


def test_order_hidden_files_and_other_types(tmp_path, caplog):
    seen = ("b.txt", "a.TXT", "sub/d.txt")
    for path in (*seen, ".hidden.txt", ".git/c.txt", "sub/e.odt", "LICENSE"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    documents, loader = load(tmp_path)
    assert [d.metadata["source"] for d in documents] == ["a.TXT", "b.txt", "sub/d.txt"]
    assert loader.failed == {}
    [told] = caplog.messages
    assert told == "Left out, as files of these types are not read: LICENSE, sub/e.odt"


def test_of_many_files_of_other_types_the_first_are_named(tmp_path, caplog):
    load(tmp_path, **{f"{number}_png": "" for number in range(9)}, z_md="text")
    [told] = caplog.messages
    assert told.endswith(": 0.png, 1.png, 2.png, 3.png, 4.png and 4 more")


def test_reading_is_lazy(tmp_path):
    load(tmp_path, a_txt="one", b_txt="two")
    documents = FolderLoader(tmp_path).lazy_load()
    assert next(documents).page_content == "one"
    (tmp_path / "b.txt").write_text("changed")
    assert next(documents).page_content == "changed"


def blank_pdf():
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    return writer


def locked_pdf():
    writer = blank_pdf()
    writer.encrypt("secret", algorithm="RC4-128")
    return writer


BROKEN = {
    "utf16.txt": ("text".encode("utf-16"), "it is not UTF-8 (byte 0xff); save it as UTF-8"),
    "gbk.csv": ("列\n值".encode("gbk"), "it is not UTF-8 (byte 0xc1); save it as UTF-8"),
    "cut.json": (b'[{"a": 1}, ', "Expecting value: line 1 column 12 (char 11)"),
    "cut.jsonl": (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8"),
    "fake.docx": (b"not a document", "mammoth: File is not a zip file"),
    "empty.docx": (docx("</w:p>"), "mammoth: "),
    "deep.json": (b"[" * 100_000, ""),
    "cut.pdf": (PDF.read_bytes()[:1500], "pypdf: "),
    "fake.pdf": (b"not a pdf", "pypdf: "),
    "wide.csv": (b"a\n" + b"x" * 200_000, "field larger than field limit (131072)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_reported_and_passed_over(tmp_path, caplog, name):
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    documents, loader = load(tmp_path, z_md="still here")
    assert [d.page_content for d in documents] == ["still here"]
    assert list(loader.failed) == [name]
    assert loader.failed[name].startswith(reason)
    assert f"{name} cannot be read: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("writer", "reason"),
    [(blank_pdf, "no page has text in it"), (locked_pdf, "pypdf: File has not been decrypted")],
)
def test_a_pdf_without_readable_text_is_reported(tmp_path, writer, reason):
    writer().write(tmp_path / "a.pdf")
    _, loader = load(tmp_path, z_md="still here")
    assert loader.failed["a.pdf"].startswith(reason)


def test_what_comes_before_the_damage_is_kept(tmp_path, caplog):
    rows = b"".join(b"row %d\n" % number for number in range(3000))
    documents, loader = load(tmp_path, a_csv=b"head\n" + rows + b"\xff\n")
    assert 0 < len(documents) <= 3000
    assert f"({len(documents)} documents) is kept" in caplog.text
    assert list(loader.failed) == ["a.csv"]


def test_json_lines_before_the_damage_are_kept(tmp_path):
    documents, loader = load(tmp_path, a_jsonl=f"{LINES}{{")
    assert len(documents) == 3
    assert loader.failed["a.jsonl"].startswith("Expecting property name")
    assert loader.failed["a.jsonl"].endswith(": line 5 column 2")


def test_a_bar_counts_the_files(tmp_path, capsys):
    load(tmp_path, a_md="one", b_md="two", c_png="left out")
    assert capsys.readouterr().err == ""
    FolderLoader(tmp_path, show_progress=True).load()
    assert "2/2" in capsys.readouterr().err


def test_a_dangling_link_and_a_special_file(tmp_path):
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    documents, loader = load(tmp_path, z_md="still here")
    assert len(documents) == 1
    assert loader.failed == {"gone.md": "No such file or directory"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission(tmp_path):
    load(tmp_path, a_md="secret")
    (tmp_path / "a.md").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    _, loader = load(tmp_path, z_md="still here")
    assert loader.failed == {"a.md": "Permission denied", "closed": "Permission denied"}


def test_lone_surrogates_are_replaced(tmp_path):
    documents, _ = load(tmp_path, a_json='["half a pair: \\ud83d"]')
    assert documents[0].page_content == "half a pair: ?"


def test_empty_files_give_nothing(tmp_path):
    empty = dict.fromkeys(("a_txt", "b_csv", "c_json", "d_html", "e_pdf", "e_jsonl", "e_docx"), "")
    documents, loader = load(tmp_path, **empty, f_md=" \n", g_csv="head\n", h_md="text")
    assert [d.metadata["source"] for d in documents] == ["h.md"]
    assert loader.failed == {}


def test_a_second_run_forgets_old_failures(tmp_path):
    load(tmp_path, a_json="{", b_md="text")
    loader = FolderLoader(tmp_path)
    loader.load()
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert len(loader.load()) == 2
    assert loader.failed == {}


@pytest.mark.parametrize("folder", ["missing", "file.md"])
def test_no_folder(tmp_path, folder):
    (tmp_path / "file.md").write_text("text")
    with pytest.raises(NotADirectoryError, match=f"There is no folder .*{folder}"):
        FolderLoader(tmp_path / folder).load()


def test_nothing_to_read(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.odt").write_text("text")
    with pytest.raises(ValueError, match=r"No text .* \(1 files could not be read\).*\.md, \.txt"):
        FolderLoader(tmp_path).load()


def test_the_handbook_reads_without_a_failure(tmp_path):
    shutil.copytree(HANDBOOK, tmp_path / "copy")
    documents, loader = load(tmp_path / "copy")
    assert loader.failed == {}
    assert {Path(d.metadata["source"]).suffix for d in documents} == {
        *(".md", ".txt", ".csv", ".json", ".html", ".pdf")
    }
    assert {Path(d.metadata["source"]).parts[0] for d in documents} == {"en", "zh"}


async def test_the_async_way_reads_the_same(tmp_path):
    documents, loader = load(tmp_path, a_md="one", b_csv="x\n1\n2\n")
    assert [d async for d in loader.alazy_load()] == documents
