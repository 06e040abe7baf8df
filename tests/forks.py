"""What killed_run and killed_search share: processes that die at given moments."""

import os
import signal
import sys


def die():
    """Ends this process as the machine would."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, hook):
    """Calls `hook` with the arguments of `owner.name` before it is called."""
    function = getattr(owner, name)

    def hooked(*args, **kwargs):
        hook(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, hooked)


def run(main):
    """Runs `main(moment, argv)` of the command line's moments, each in a process of its own.

    They are forked from this one once the backend is imported, which is most of such a short run.
    The first that does not die by SIGKILL ends it, with its exit status.
    """
    for number, moment in enumerate(sys.argv[1].split(",")):
        process = os.fork()
        if not process:
            status = main(moment, sys.argv[2:])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status != -signal.SIGKILL:
            print(f"{number} killed, then {moment} ended with {status}")
            sys.exit(status)
    sys.exit(f"all {number + 1} killed")
