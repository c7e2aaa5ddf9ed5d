"""Uploading, checking, listing and deleting files."""

import tempfile
from pathlib import Path

import openai
from harness import CLIENT, GOOD, Seen, check, refusal, upload


@check("21")
def a_large_upload() -> Seen:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.truncate(200 << 20)
        with Path(file.name).open("rb") as stream:
            made = CLIENT.files.create(file=stream, purpose="fine-tune")
    CLIENT.files.delete(made.id)
    return {"status": made.status, "bytes": made.bytes}


@check("22")
def validation() -> Seen:
    bad = b'{"messages": [{"role": "user", "content": "x"}]}\n'
    seen = {}
    for name, content in {"good": GOOD, "partly": GOOD + bad, "hopeless": b"hello\n"}.items():
        file = CLIENT.files.wait_for_processing(upload(content).id, poll_interval=0.1, max_wait_seconds=200)
        seen[name] = [file.status, file.validation["error_count"], file.status_details]
    assert [row[0] for row in seen.values()] == ["processed", "processed", "error"]
    assert "line 1" in seen["hopeless"][2]
    return seen


@check("23")
def expiry() -> Seen:
    file = upload(expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    return refusal(lambda: upload(expires_after={"anchor": "created_at", "seconds": 3599}))


@check("24")
def life_of_a_file() -> Seen:
    made = [upload(b"x%d" % n, purpose="user_data").id for n in range(3)]
    listed = [file.id for file in CLIENT.files.list(purpose="user_data", order="asc")]
    assert listed[-3:] == made
    assert CLIENT.files.content(made[0]).read() == b"x0"
    gone = CLIENT.files.delete(made[0])
    again = refusal(lambda: CLIENT.files.delete(made[0]), openai.NotFoundError)
    return {"deleted": gone.deleted, "object": gone.object, "again": again}
