"""`make serve`: ComfyUI on 127.0.0.1 with this pack and its models in place, until Ctrl-C. PORT=... chooses the port."""

import os
import socket
import sys

from comfy_server import HOST, ComfyServer, ServerError


def main():
    port = int(os.environ.get("PORT") or 8188)
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            sys.exit(f"Port {port} is taken. Choose another: PORT={port + 1} make serve.")
    try:
        with ComfyServer(port=port, echo=True) as server:
            print(f"\nComfyUI with Tessera: {server.url}   (Ctrl-C stops it)\n", flush=True)
            server.process.wait()
    except ServerError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nStopped.")


if __name__ == "__main__":
    main()
