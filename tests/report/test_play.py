"""The page of `lit-distill play`: in a browser, and asked directly."""

import http.client
import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from students import away, checkpoint_of, module

from lit_distill.cli import main
from lit_distill.errors import InputError
from lit_distill.export.load_student import load_student
from lit_distill.report.play import Playground
from lit_distill.report.play_server import PlayServer

HOSTILE = "<img src=x onerror=alert(1)> 'seven'"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("play") / "student.ckpt"
    content = checkpoint_of(away(module("tiny-digits")))
    content["lit_distill"]["facts"]["examples"][0]["prompt"] = HOSTILE
    content["lit_distill"]["facts"]["teacher"] = {
        "teacher_num_inference_steps": "6",
        "teacher_cfg_scale": "3.0",
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def playground(checkpoint):
    return Playground(checkpoint)


@contextmanager
def serving(playground):
    with PlayServer(playground, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def pixels(uri):
    import base64
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), int)


def test_the_images_are_those_of_plain_pipelines(playground, checkpoint):
    prompt = "a red handwritten seven on a blue background"
    answers = {
        name: playground.sample(name, prompt, 5, steps)
        for name, steps in (("student", 4), ("undistilled", 4), ("teacher", 6), ("student", 4))
    }
    student = load_student(checkpoint)
    call = {"height": 16, "width": 16, "num_inference_steps": 4}

    def noise():
        return torch.Generator().manual_seed(5)

    expected = {"student": student(prompt, generator=noise()).images[0]}
    student.transformer.disable_adapters()
    expected["undistilled"] = student(prompt, **call, generator=noise()).images[0]
    call |= {"num_inference_steps": 6, "true_cfg_scale": 3.0, "negative_prompt": " "}
    expected["teacher"] = student(prompt, **call, generator=noise()).images[0]
    shown = {name: pixels(answer["image"]) for name, answer in answers.items()}
    for name, image in expected.items():
        assert np.abs(shown[name] - np.asarray(image, int)).max() <= 1, name
    assert not np.array_equal(shown["student"], shown["undistilled"])
    assert answers["teacher"]["caption"] == "6 steps, cfg 3"
    assert all(answer["seconds"] > 0 for answer in answers.values())


def test_a_fully_trained_student_keeps_its_teacher(tmp_path):
    model = module("tiny-digits", lora=None)
    with torch.no_grad():
        for parameter in model.pipe.transformer.parameters():
            parameter.mul_(0.9)
    torch.save(checkpoint_of(model), tmp_path / "full.ckpt")
    full = Playground(tmp_path / "full.ckpt")
    lora = tmp_path / "lora.ckpt"
    torch.save(checkpoint_of(away(module("tiny-digits"))), lora)
    images = [
        pixels(playground.sample(name, "a red seven", 5, 2)["image"])
        for playground in (full, Playground(lora))
        for name in ("undistilled", "student")
    ]
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("judge", "a", 0, 1), "contender must be one of teacher, undistilled, student"),
        (("student", " ", 0, 1), "the prompt is empty"),
        (("student", "a", -1, 1), "seed must be an integer from 0 to "),
        (("student", "a", 0, 0), "steps must be an integer from 1 to 1000, got 0"),
        (("student", "a", 0, True), "steps must be an integer"),
    ],
)
def test_wrong_values_are_named(playground, wanted, message):
    with pytest.raises(InputError, match=message):
        playground.sample(*wanted)


def test_other_sites_and_other_requests_are_refused(playground):
    good = {"contender": "student", "prompt": "a red seven", "seed": 0, "steps": 2}
    with serving(playground) as server:

        def ask(method, path="/", body=None, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

        json_type = {"Content-Type": "application/json"}
        assert server.server_address[0] == "127.0.0.1"
        assert ask("GET")[0] == 200
        assert ask("GET", "/other")[0] == 404
        assert ask("GET", Host="evil.example:7860")[0] == 403
        assert ask("POST", "/sample", json.dumps(good), **json_type)[0] == 200
        assert ask("POST", "/sample", json.dumps(good), **json_type, Host="evil.example")[0] == 403
        assert ask("POST", "/sample", json.dumps(good), **{"Content-Type": "text/plain"})[0] == 403
        wrong = [json.dumps(good | {"steps": steps}) for steps in ("4", 1)]  # no one-step schedule
        for body in ("{", "[]", *wrong, "9" * 70_000):
            status, answer = ask("POST", "/sample", body, **json_type)
            assert status == 400 and json.loads(answer)["error"], body[:20]
        with pytest.raises(InputError, match=f"can't listen on port {server.server_port} of 127"):
            PlayServer(playground, port=server.server_port)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_page_works_in_a_browser(playground, monkeypatch):
    with serving(playground) as server, Browser() as browser:
        browser.open_url(server.url)
        assert browser.run("document.getElementById('prompt').value") == HOSTILE
        assert browser.run("document.getElementById('steps').value") == "4"
        assert browser.run("document.getElementById('teacher_steps').value") == "6"

        def generate():
            browser.run("document.getElementById('go').click()")
            deadline = time.monotonic() + 60
            while browser.run("document.getElementById('go').disabled"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            return browser.run("[...document.querySelectorAll('.state')].map((p) => p.innerText)")

        states = generate()
        assert [state.partition(" s, ")[2] for state in states] == [
            "6 steps, cfg 3",
            "4 steps, cfg 1",
            "4 steps, cfg 1",
        ]
        sizes = "[...document.images].map((image) => [image.naturalWidth, image.hidden])"
        assert browser.run(sizes) == [[16, False]] * 3
        asked = playground.sample("student", HOSTILE, 3, 4)["image"]
        assert browser.run("document.querySelector('#student img').src") == asked
        assert browser.problems == []
        assert set(browser.requests) == {server.url, f"{server.url}sample"}

        def fails(*arguments):
            raise RuntimeError("out of <b>memory</b>")

        monkeypatch.setattr(playground, "sample", fails)
        assert generate() == ["RuntimeError: out of <b>memory</b>"] * 3
        assert browser.run("[...document.images].every((image) => image.hidden)")


def test_the_command_serves_until_it_is_interrupted(checkpoint, monkeypatch, capsys):
    asked = []

    def interrupted(server):
        asked.append(server.url)
        raise KeyboardInterrupt

    monkeypatch.setattr(PlayServer, "serve_forever", interrupted)
    main(["play", "--ckpt_path", str(checkpoint), "--port", "0", "--trainer.accelerator", "cpu"])
    printed = capsys.readouterr().out
    assert f"Open {asked[0]} in a browser" in printed and asked[0].startswith("http://127.0.0.1:")
