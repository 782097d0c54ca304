# SPDX-License-Identifier: Apache-2.0
"""Clients across fork, each case in a process of its own: real forks, real calls on both sides."""

import subprocess
import sys
import textwrap
from pathlib import Path

from support.echo import EchoServer

TESTS = Path(__file__).parent.parent

PRELUDE = """
import asyncio, os, signal, sys, threading
import numpy as np
import thirdrail
from thirdrail.aio import AsyncClient

signal.alarm(60)  # a hang is a failure
url = sys.argv[1]
X = {"x": np.ones((2, 2), np.float32)}

def forked(body):
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(50)  # the parent's does not count here
    code = 1
    try:
        body()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def succeeded(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def run(echo: EchoServer, script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), echo.url, str(TESTS)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_children_and_parent_call_at_the_same_time(echo: EchoServer) -> None:
    run(
        echo,
        """
        client = thirdrail.Client(url)

        def call():
            for _ in range(20):
                assert client.infer("echo", X)["x"].shape == (2, 2)
            with client.stream() as stream:
                assert stream.submit("echo", X).result()["x"].shape == (2, 2)

        call()
        children = [forked(call) for _ in range(4)]
        call()
        assert all([succeeded(pid) for pid in children])
        call()
        """,
    )


def test_a_child_that_closes_leaves_the_parent_connected(echo: EchoServer) -> None:
    run(
        echo,
        """
        client = thirdrail.Client(url)
        client.infer("echo", X)
        before = client._connected()
        if os.fork() == 0:
            client.infer("echo", X)
            client.close()
            sys.exit()  # the ordinary way out, which destroys every object
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        client.infer("echo", X)
        assert client._connected() is before
        """,
    )


def test_a_lock_that_a_thread_held_does_not_stop_the_child(echo: EchoServer) -> None:
    run(
        echo,
        """
        from thirdrail import client as module

        client, original = thirdrail.Client(url), module.find_address
        connecting, go_on = threading.Event(), threading.Event()

        def find_slowly(*args, **options):
            connecting.set()
            go_on.wait()
            return original(*args, **options)

        module.find_address = find_slowly
        thread = threading.Thread(target=client.infer, args=("echo", X))
        thread.start()
        connecting.wait()
        module.find_address = original
        assert succeeded(forked(lambda: client.infer("echo", X)))
        go_on.set()
        thread.join()

        sys.path.insert(0, sys.argv[2])
        from support.lanes import ScriptedPeer

        peer = ScriptedPeer()
        future, held, may_go = peer.caller.submit("m", X), threading.Event(), threading.Event()

        def hold():
            with future._condition:
                held.set()
                may_go.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = forked(lambda: None)  # it closes what it inherited, and tells nobody
        hung = threading.Timer(30, os.kill, (child, signal.SIGKILL))  # it has no alarm yet
        hung.start()
        assert succeeded(child)
        hung.cancel()
        may_go.set()
        thread.join()
        """,
    )


def test_a_child_that_forks_again(echo: EchoServer) -> None:
    run(
        echo,
        """
        client = thirdrail.Client(url)
        client.infer("echo", X)

        def child():
            client.infer("echo", X)
            assert succeeded(forked(lambda: client.infer("echo", X)))

        assert succeeded(forked(child))
        """,
    )


def test_a_fork_right_after_a_close(echo: EchoServer) -> None:
    run(
        echo,
        """
        def call():
            with thirdrail.Client(url) as client:
                client.infer("echo", X)

        children = []
        for _ in range(20):
            call()
            children.append(forked(call))
        assert all([succeeded(pid) for pid in children])
        """,
    )


def test_asyncio_works_after_the_parent_closed(echo: EchoServer) -> None:
    run(
        echo,
        """
        async def call():
            async with AsyncClient(url) as client:
                await client.infer("echo", X)

        asyncio.run(call())
        child = forked(lambda: asyncio.run(call()))
        asyncio.run(call())
        assert succeeded(child)
        """,
    )


def test_asyncio_refuses_where_it_would_hang(echo: EchoServer) -> None:
    output = run(
        echo,
        """
        client = AsyncClient(url)

        async def call(client):
            await client.infer("echo", X)

        def child():
            for mine in (client, AsyncClient(url)):
                try:
                    asyncio.run(call(mine))
                except thirdrail.CallerError as error:
                    print(error)

        asyncio.run(call(client))
        assert succeeded(forked(child))
        asyncio.run(client.close())
        """,
    )
    assert output.count("open when this process was forked") == 2
