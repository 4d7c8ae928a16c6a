"""torchrun, without its traceback where a signal ends it or nodes cannot meet. For torchrun.sh."""

import logging
import signal
import socket
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torchrun has its own handlers: importing torch takes seconds
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main as torchrun

    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(_is_news)
    try:
        torchrun()
    except SignalException:
        sys.exit(1)  # as with the traceback; the ranks have said what there is to say
    except DistNetworkError as error:
        problem, *_ = str(error).splitlines()
        taken = ": set MASTER_PORT to a free one, this one is probably another run's" if "EADDRINUSE" in problem else ""
        sys.exit(f"error: torchrun on {socket.gethostname()}: {problem}{taken}")


def _is_news(record: logging.LogRecord) -> bool:
    """Not what torchrun does about a signal, or about the other ranks when one has failed."""
    return "death signal" not in record.getMessage() and "closing signal" not in record.getMessage()


if __name__ == "__main__":
    main()
