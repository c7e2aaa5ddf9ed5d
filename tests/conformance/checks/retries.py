"""Lost answers, repeated orders, idempotency keys."""

from concurrent.futures import ThreadPoolExecutor

from harness import CLIENT, JOBS, MAJOR, MODEL, Seen, check, drop, log, order, refusal, training_file, upload


@check("43")
def a_lost_order() -> Seen:
    file = training_file()
    drop("POST /v1/fine_tuning/jobs")
    before = len(log())
    reply = JOBS.with_raw_response.create(model=MODEL, training_file=file, seed=4343 + MAJOR)
    lines = [line for line in log()[before:] if line["line"] == "POST /v1/fine_tuning/jobs"]
    assert reply.headers["idempotency-replayed"] == "true"
    assert sum(each.seed == 4343 + MAJOR for each in JOBS.list(limit=20).data) == 1
    return {"retries": [line["retry"] for line in lines]}


@check("44")
def twice_on_purpose() -> Seen:
    first, second = order(seed=44), order(seed=44)
    return {"different": first.id != second.id}


@check("45")
def a_lost_upload() -> Seen:
    content = f"{MAJOR} lost".encode()
    drop("POST /v1/files")
    file = upload(content, purpose="evals")
    same = [each for each in CLIENT.files.list(purpose="evals") if each.bytes == len(content)]
    assert [each.id for each in same] == [file.id]
    assert CLIENT.files.content(file.id).read() == content
    CLIENT.files.delete(file.id)
    return {"files": len(same)}


@check("46")
def keys() -> Seen:
    header = {"Idempotency-Key": f"key-{MAJOR}"}
    first, second = (order(seed=1, extra_headers=header) for _ in range(2))
    other = refusal(lambda: order(seed=2, extra_headers=header))
    parallel = {"Idempotency-Key": f"parallel-{MAJOR}"}
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: order(seed=1, extra_headers=parallel).id, range(4)))
    return {"same": first.id == second.id, "other": other, "parallel": len(ids)}
