"""Text from outside that one database takes and the other does not, or that parsers read differently."""

import json
import re
from typing import Any

import httptools
import pytest

from api.http import bodies
from tests.api.conftest import JOBS, Lab, refused
from tests.things import MODEL

PATH_NAME = re.compile(r"{(\w+)(:path)?}")
PADDED = {"": {}, "a large body": {"metadata": {"k": "v" * 512}, "lora": {"target_modules": ["q" * 200] * 500}}}


def test_a_nul_character_in_a_path_or_a_query_is_the_same_refusal_everywhere(app: Any, lab: Lab) -> None:
    walked = set()
    for path, operations in app.openapi()["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for verb, operation in operations.items():
            whole = PATH_NAME.sub("x", path)
            for name in [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]:
                reply = lab.client.request(verb, f"{whole}?{name}=a%00b")
                refused(reply, 400, "invalid_value", name)
                walked.add((path, name))
            for name, _ in PATH_NAME.findall(path):
                strange = PATH_NAME.sub(lambda found, name=name: "a%00b" if found[1] == name else "x", path)
                refused(lab.client.request(verb, strange), 400, "invalid_value", name)
                walked.add((path, name))
    assert len(walked) >= 30


@pytest.mark.parametrize("query", ["metadata%5Ba%00b%5D=c", "metadata%5Ba%5D=%00"])
def test_a_nul_character_in_a_filter_is_refused(lab: Lab, query: str) -> None:
    refused(lab.client.get(f"{JOBS}?{query}"), 400, "invalid_value", "metadata")


def test_who_has_no_key_is_told_nothing_but_that(lab: Lab) -> None:
    refused(lab.client.get(f"{JOBS}?after=%00", headers={"authorization": ""}), 401, "missing_api_key")


def test_a_nul_character_in_a_header_is_no_http() -> None:
    """So nothing behind the server's parser has to look for one."""
    with pytest.raises(httptools.HttpParserError):
        httptools.HttpRequestParser(object()).feed_data(b"GET / HTTP/1.1\r\nlast-event-id: a\x00b\r\n\r\n")


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("place", ['"model": "x", "model": "y"', '"lora": {"r": 8, "r": 16}'])
def test_a_key_that_a_body_has_twice_is_named(lab: Lab, padding: str, place: str) -> None:
    rest = json.dumps({"training_file": "file-x", **PADDED[padding]})
    body = f"{{{place}, {rest[1:]}"
    assert (len(body) > bodies.LARGE) == bool(padding)
    reply = lab.client.post(JOBS, content=body, headers={"content-type": "application/json"})
    refused(reply, 400, "invalid_json", "model" if "model" in place else "r")


def test_a_key_that_a_label_has_twice_is_named(lab: Lab) -> None:
    labels = {"lora_config": '{"r": 8, "r": 16}'}
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": "file-x", "metadata": labels})
    assert "the key 'r' occurs twice" in refused(reply, 400, "invalid_value", "metadata.lora_config")["message"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_body_that_is_not_utf_8_is_refused(lab: Lab, encoding: str) -> None:
    body = json.dumps({"model": MODEL, "training_file": lab.upload()["id"]}).encode(encoding)
    refused(lab.client.post(JOBS, content=body, headers={"content-type": "application/json"}), 400, "invalid_json")


def test_a_byte_order_mark_of_utf_8_is_passed_over(lab: Lab) -> None:
    body = json.dumps({"model": MODEL, "training_file": lab.upload()["id"]}).encode("utf-8-sig")
    reply = lab.client.post(JOBS, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 200
