#!/usr/bin/env python3
"""A snapshot writer in Python, made from PROTOCOL.md section 5 alone; standard library only.

The application is a log: a thread appends numbered lines to a file and counts a line only when it is on the disk. The
writer is its part in snapshot sets: while a set is frozen no line is appended, and afterwards it can prove so.
"""

import argparse
import json
import os
import socket
import threading
import time

LINE_MAX = 1 << 20


class Log:
    """The application. Whoever has the gate may write; nobody else can."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        self.gate = threading.Lock()
        self.open()

    def open(self):
        self.file = open(self.path, "ab+")
        self.file.seek(0)
        self.position = sum(1 for _ in self.file)

    def run(self):
        while True:
            with self.gate:
                self.file.write(b"%d\n" % (self.position + 1))
                self.file.flush()
                os.fsync(self.file.fileno())
                self.position += 1
            time.sleep(0.002)


class Refused(Exception):
    """The answer is no, for this reason and with this code."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Gone(Exception):
    """The connection has ended."""


class Writer:
    """One connection to the agent."""

    def __init__(self, log, options):
        self.log = log
        self.options = options
        self.held = False  # it has the gate
        self.until = None  # end of the hold, by its own clock
        self.generation = None
        self.frozen_at = None  # the last line that is in the copy
        self.received = b""

    def serve(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.connect(self.options.socket)
            self.send(self.registration())
            while True:
                event = self.next_event()
                if event is None:
                    self.resume()
                    self.send({"release": "the hold has lasted too long", "generation": self.generation})
                elif event["event"] == "welcome":
                    if "refused" in event:
                        raise SystemExit("the agent refused this writer: " + event["refused"])
                else:
                    self.send(self.answer(event))
        except (Gone, OSError):
            pass
        finally:
            # Rule 3: whatever has ended the connection, the application goes on.
            self.resume()
            self.socket.close()

    def registration(self):
        return {
            "protocol": 1,
            "class_id": "example-log",
            "instance_id": "example-log:" + self.log.path,
            "name": "Example log",
            "level": "BACK_END",
            "freeze_timeout_ms": self.options.freeze_timeout_ms,
            "hold": "app",
        }

    def send(self, message):
        self.socket.settimeout(None)
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def next_event(self):
        """The next event, or None when the hold is over by our own clock (rule 2)."""
        while b"\n" not in self.received:
            if len(self.received) > LINE_MAX:
                raise Gone
            if self.until is not None:
                left = self.until - time.monotonic()
                if left <= 0:
                    return None
                self.socket.settimeout(left)
            else:
                self.socket.settimeout(None)
            try:
                received = self.socket.recv(65536)
            except TimeoutError:
                continue
            if not received:
                raise Gone
            self.received += received
        line, self.received = self.received.split(b"\n", 1)
        return json.loads(line)

    def answer(self, event):
        answer = {"seq": event["seq"], "ok": True}
        try:
            answer.update(getattr(self, "on_" + event["event"])(event) or {})
        except Refused as refused:
            answer.update(ok=False, code=refused.code, message=str(refused))
        return answer

    def resume(self):
        self.until = None
        if self.log.file.closed:
            # A restore was open.
            self.log.open()
        if self.held:
            self.held = False
            self.log.gate.release()

    def hold(self, seconds):
        if not self.held:
            if not self.log.gate.acquire(timeout=seconds):
                raise Refused("RETRYABLE", "a line is being written for too long")
            self.held = True

    # The events.

    def on_identify(self, event):
        directory, name = os.path.split(self.log.path)
        return {
            "metadata": {
                "version": "1",
                "usage": "USER_DATA",
                "source": "TRANSACTED_DB",
                "restore_method": {"method": "RESTORE_IF_CAN_REPLACE"},
                "stamps": True,
                "components": [
                    {
                        "type": "database",
                        "name": name,
                        "caption": "All lines of " + self.log.path,
                        "selectable_for_restore": True,
                        "database_files": [{"path": directory, "spec": name}],
                    }
                ],
            }
        }

    def on_prepare_backup(self, event):
        if event["backup_type"] == "log":
            raise Refused("NONRETRYABLE", "it has no logs beside its data")

    def on_prepare_snapshot(self, event):
        # What a database does here takes long; it says so now and then.
        self.send({"seq": event["seq"], "progress": "writing back"})
        os.fsync(self.log.file.fileno())

    def on_freeze(self, event):
        until = time.monotonic() + event["hold_ms"] / 1000
        self.hold(event["deadline_ms"] / 1000 * 3 / 4)
        self.until = until
        self.generation = event["generation"]
        self.frozen_at = self.log.position
        return {"evidence": {"position": self.frozen_at}}

    def on_thaw(self, event):
        in_time = self.held and self.until is not None and time.monotonic() < self.until
        evidence = {"position": self.log.position}
        self.resume()
        return {"held": in_time and event["generation"] == self.generation, "evidence": evidence}

    def on_post_snapshot(self, event):
        # Where the next incremental backup begins: the log has gone on since the thaw, and that is not in the copy.
        name = os.path.basename(self.log.path)
        return {"components": [{"name": name, "stamp": str(self.frozen_at)}]}

    def on_backup_complete(self, event):
        pass

    def on_backup_shutdown(self, event):
        pass

    def on_abort(self, event):
        self.resume()

    def on_pre_restore(self, event):
        self.hold(event["deadline_ms"] / 1000)
        self.log.file.close()

    def on_post_restore(self, event):
        self.resume()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the log")
    parser.add_argument("--socket", default="/run/vmshadow/writers.sock")
    parser.add_argument("--freeze-timeout-ms", type=int, default=20000)
    options = parser.parse_args()
    log = Log(options.file)
    threading.Thread(target=log.run, daemon=True).start()
    while True:
        Writer(log, options).serve()
        time.sleep(0.2)


if __name__ == "__main__":
    main()
