"""torchrun, without its traceback where a signal ends it, a rank fails or nodes cannot meet. For torchrun.sh."""

import logging
import signal
import socket
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torchrun has its own handlers: importing torch takes seconds
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(_is_news)
    try:
        torchrun()
    except SignalException:
        sys.exit(1)  # as with the traceback; the ranks have said what there is to say
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        killed = f"error: rank {rank} on {socket.gethostname()} was killed by {failure.signal_name()}, often for lack of memory"
        sys.exit(killed if failure.exitcode < 0 else 1)  # else it has said why itself
    except DistNetworkError as error:
        problem, *_ = str(error).splitlines()
        taken = ": set MASTER_PORT to a free one, this one is probably another run's" if "EADDRINUSE" in problem else ""
        sys.exit(f"error: torchrun on {socket.gethostname()}: {problem}{taken}")


def _is_news(record: logging.LogRecord) -> bool:
    """Not what torchrun does about a signal, or about the other ranks when one has failed."""
    return not any(sign in record.getMessage() for sign in ("death signal", "closing signal", "failed (exitcode"))


if __name__ == "__main__":
    main()
