"""What vLLM's command is, as far as a process is concerned: it listens where it is told to. Standard library only.

What comes in goes on to the server at `$FAKE_VLLM_UPSTREAM`; arguments and environment are written to
`$FAKE_VLLM_NOTES`. `$FAKE_VLLM_FAILS` has it say that and end.
"""

import asyncio
import json
import os
import sys


async def forward(reader, writer):
    host, port = os.environ["FAKE_VLLM_UPSTREAM"].removeprefix("http://").split(":")
    there, onwards = await asyncio.open_connection(host, int(port))

    async def pump(source, target):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    await asyncio.gather(pump(reader, onwards), pump(there, writer), return_exceptions=True)
    writer.close()
    onwards.close()


async def main():
    port = sys.argv[sys.argv.index("--port") + 1]
    server = await asyncio.start_server(forward, "127.0.0.1", int(port))
    await server.serve_forever()


if __name__ == "__main__":
    with open(os.environ["FAKE_VLLM_NOTES"], "w") as notes:
        json.dump({"pid": os.getpid(), "arguments": sys.argv[1:], "environment": dict(os.environ)}, notes)
    if "FAKE_VLLM_FAILS" in os.environ:
        sys.exit(os.environ["FAKE_VLLM_FAILS"])
    asyncio.run(main())
