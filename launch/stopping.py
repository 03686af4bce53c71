"""What SIGTERM, Ctrl-C and a lost terminal mean to a run: finish the step, save, end; a second
Ctrl-C ends at once.

A thread hears them, for Python runs its own handlers only between two bytecodes of the main thread,
which may wait for a device, or a compiler, for a long time. Must not know what a run saves.
"""

import os
import signal
import socket
import stat
import threading

from launch.flags import INTERRUPTED

_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopping:
  """As a context, hears SIGTERM, SIGINT and SIGHUP in place of what they did before; a SIGHUP that
  is ignored, as under nohup, stays so.

  Attributes:
    exit_code: of a process that was stopped: 0 after SIGTERM, as job schedulers expect, and after
      SIGHUP; 130 after Ctrl-C, as shells do.
  """

  exit_code = 0

  def __init__(self):
    self._asked = threading.Event()
    self._read, self._write = socket.socketpair()
    self._write.setblocking(False)

  def is_asked(self) -> bool:
    """Returns whether a signal has come."""
    return self._asked.is_set()

  def __enter__(self):
    # A handler that does nothing: without one, the signal would not reach the wakeup socket.
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in _HEARD if number != signal.SIGHUP or not is_ignored]
    self._before = {number: signal.signal(number, lambda *_: None) for number in heard}
    self._wakeup_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._hear, name="signals", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._wakeup_before)
    for number, handler in self._before.items():
      # None stands for a handler that was not set from Python, which cannot be set again.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._write.close()
    self._thread.join()
    self._read.close()

  def _hear(self):
    while byte := self._read.recv(1):
      number = byte[0]
      if number == signal.SIGINT and self.exit_code == INTERRUPTED:  # the second of its kind
        os._exit(INTERRUPTED)
      if number in _HEARD:
        if number == signal.SIGINT:
          self.exit_code = INTERRUPTED
        if number == signal.SIGHUP:
          _leave_terminal()
        self._asked.set()


def _leave_terminal() -> None:
  """Sends what is still to be printed nowhere, where it went to the terminal that is gone: it would
  end the run before it has saved.
  """
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for stream in (1, 2):
    if stat.S_ISCHR(os.fstat(stream).st_mode):
      os.dup2(nowhere, stream)
  os.close(nowhere)
