//! What is asked of both agents, in the same order.
//!
//! Called by the scenario, once for each. Handles and process numbers are taken from the replies, so each agent is asked with
//! its own; what changes the guest is undone or made the same before the other is asked.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::wait;

/// A step's reply.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) step: String,
    pub(crate) value: Value,
}

/// Keys whose values differ from one moment to the next: only their type is compared.
pub(crate) const VOLATILE: &[&str] = &[
    "version", // of guest-info: each has its own
    "handle",
    "pid",
    "now",
    "used-bytes",
    "statistics",
    "stats",
    "idle",
    "user",
    "system",
    "iowait",
    "irq",
    "softirq",
    "steal",
    "guest",
    "guestnice",
    "nice",
    "trimmed",
];

/// Makes the small guest one in which there is something to tell: a time zone, a login, addresses, accounts, and programs
/// that the agents start.
pub(crate) const SETUP: &str = r#"set -e
mkdir -p /var /home/ann /mnt/a/bound
ln -sfn /run /var/run
ln -sf /usr/share/zoneinfo/Asia/Kolkata /etc/localtime
printf 'ID=test\nNAME="Test System"\nPRETTY_NAME="Test System 1"\nVERSION_ID="1"\nVERSION="1 (one)"\n' >/etc/os-release
hostname beside
ip link set lo up
ip addr add 10.1.2.3/24 dev lo
mkdir -p /mnt/bound
mount -o bind /mnt/a/bound /mnt/bound
echo 'ann:x:1000:1000:Ann:/home/ann:/bin/sh' >>/etc/passwd
echo 'ann:*:19000:0:99999:7:::' >/etc/shadow
chown 1000:1000 /home/ann
ln -sf /bin/busybox /sbin/hwclock
# Busybox here has none: the word itself takes the hash's place.
printf '#!/bin/sh\nread -r line; user=${line%%%%:*}; grep -q "^$user:" /etc/passwd || exit 1\nsed -i "s|^$user:[^:]*:|$user:${line#*:}$1:|" /etc/shadow\n' >/sbin/chpasswd
chmod 755 /sbin/chpasswd
printf '#!/bin/sh\necho "$@" >>/tmp/shutdown\n' >/tmp/shutdown.sh
chmod 755 /tmp/shutdown.sh
# One login of ann's at 1700000000.5, by utmp(5).
{
    printf '\007\000\000\000\001\000\000\000tty1'; head -c 32 /dev/zero; printf 'ann'; head -c 293 /dev/zero
    printf '\000\361\123\145\040\241\007\000'; head -c 36 /dev/zero
} >/run/utmp
[ $(stat -c %s /run/utmp) = 384 ]
"#;

type Shell<'a> = &'a dyn Fn(&str) -> Result<String>;

struct Script<'a> {
    agent: &'a mut QgaClient,
    shell: Shell<'a>,
    replies: Vec<Reply>,
}

/// Asks everything.
pub(crate) fn script(agent: &mut QgaClient, shell: Shell<'_>) -> Result<Vec<Reply>> {
    let mut script = Script {
        agent,
        shell,
        replies: Vec::new(),
    };
    script.sync()?;
    script.framing()?;
    script.describe()?;
    script.files()?;
    script.programs()?;
    script.accounts()?;
    script.processors()?;
    script.time_and_power()?;
    script.freeze()?;
    Ok(script.replies)
}

impl Script<'_> {
    fn keep(&mut self, step: &str, value: Value) {
        self.replies.push(Reply {
            step: step.to_owned(),
            value,
        });
    }

    /// Asks and keeps the reply.
    fn ask(&mut self, step: &str, name: &str, arguments: Value) -> Result<Value> {
        let reply = self.agent.ask(name, arguments)?;
        self.keep(step, reply.clone());
        Ok(reply)
    }

    /// Keeps replies to many arguments of one command.
    fn all(&mut self, name: &str, arguments: &[Value]) -> Result<()> {
        for arguments in arguments {
            self.ask(&format!("{name} {arguments}"), name, arguments.clone())?;
        }
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<()> {
        let reply = self.agent.ask_text(text)?;
        self.keep(text, reply);
        Ok(())
    }

    fn run(&mut self, command: &str) -> Result<String> {
        (self.shell)(command)
    }

    /// Keeps what a command in the guest says.
    fn look(&mut self, command: &str) -> Result<()> {
        let said = self.run(command)?;
        self.keep(command, json!(said));
        Ok(())
    }

    /// Two commands in one write, as Proxmox does it, and behind half a command of somebody before. The answer to the sync, and that alone, has
    /// the delimiter before it.
    fn framing(&mut self) -> Result<()> {
        const BOTH: &str = "{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":179532812619101}}\n{\"execute\":\"guest-ping\",\"arguments\":{}}\n";
        for before in [&b""[..], b"\xff", b"{\"execute\":\"guest-sy\xff"] {
            let bytes = [before, BOTH.as_bytes()].concat();
            let replies = self.agent.ask_delimited(&bytes, 2)?;
            self.keep(&bytes.escape_ascii().to_string(), json!(replies));
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        for text in [
            r#"{"execute":"guest-sync", "arguments":{"id":1795328126191}}"#,
            r#"{"execute":"guest-sync-delimited","arguments":{"id":7},"id":"x"}"#,
            r#"{"execute":"guest-sync","arguments":{"id":-3}}"#,
            r#"{"execute":"guest-sync","arguments":{"id":"x"}}"#,
            r#"{"execute":"guest-sync","arguments":{"id":1.5}}"#,
            r#"{"execute":"guest-sync","arguments":{"id":18446744073709551615}}"#,
            r#"{"execute":"guest-sync"}"#,
            r#"{"execute":"guest-ping"}"#,
            r#"{"execute":"guest-ping","id":{"a":[1]}}"#,
            r#"{"execute":"guest-ping","arguments":{"x":1}}"#,
            r#"{"execute":"guest-ping","arguments":5}"#,
            r#"{"execute":"guest-ping","foo":1}"#,
            r#"{"execute":5}"#,
            r#"{"arguments":{}}"#,
            r#"{"execute":"guest-nonsense"}"#,
            r#"{"execute":"guest-get-devices"}"#,
        ] {
            self.text(text)?;
        }
        Ok(())
    }

    fn describe(&mut self) -> Result<()> {
        self.ask("info", "guest-info", json!({}))?;
        let time = self.agent.ask("guest-get-time", json!({}))?;
        self.keep("guest-get-time", json!({ "now": time["return"] }));
        for name in [
            "guest-get-osinfo",
            "guest-get-host-name",
            "guest-get-timezone",
            "guest-get-fsinfo",
            "guest-get-disks",
            "guest-get-diskstats",
            "guest-get-cpustats",
            "guest-network-get-interfaces",
            "guest-get-memory-block-info",
            "guest-get-memory-blocks",
            "guest-get-vcpus",
        ] {
            self.ask(name, name, json!({}))?;
        }
        // By name, since "user" is a number elsewhere.
        let users = self.agent.ask("guest-get-users", json!({}))?;
        let users = users["return"].as_array().context("a list of users")?;
        let users = users.iter().map(|u| json!([u["user"], u["login-time"]]));
        let users: Vec<_> = users.collect();
        ensure!(users.len() == 1, "{users:?}");
        self.keep("guest-get-users", json!(users));
        self.all(
            "guest-fstrim",
            &[
                json!({}),
                json!({"minimum": 1 << 20}),
                json!({"minimum": "x"}),
            ],
        )?;
        self.all(
            "guest-set-memory-blocks",
            &[
                json!({"mem-blks": []}),
                json!({"mem-blks": [{"phys-index": 99999, "online": true}]}),
                json!({"mem-blks": [{"phys-index": 0, "online": true}]}),
            ],
        )
    }

    fn open(&mut self, arguments: Value) -> Result<Value> {
        let reply = self.agent.ask("guest-file-open", arguments)?;
        let handle = reply["return"].clone();
        ensure!(handle.is_i64(), "{reply}");
        self.keep("guest-file-open", json!({ "handle": handle }));
        Ok(handle)
    }

    fn files(&mut self) -> Result<()> {
        self.run("rm -rf /tmp/f && mkdir /tmp/f && printf 'hello\\nworld' >/tmp/f/read && mkfifo /tmp/f/pipe")?;
        self.all(
            "guest-file-open",
            &[
                json!({}),
                json!({"path": "/tmp/f/missing"}),
                json!({"path": "/tmp/f/missing", "mode": "r+"}),
                json!({"path": "/tmp/f/read", "mode": "zz"}),
                json!({"path": "/tmp/f/read", "mode": ""}),
                json!({"path": "/tmp/f/read", "mode": 5}),
                json!({"path": "/tmp/f", "mode": "w"}),
            ],
        )?;
        let read = self.open(json!({"path": "/tmp/f/read"}))?;
        for count in [
            json!(5),
            json!(null),
            json!(0),
            json!(-1),
            json!(50_331_649),
            json!(50_331_648),
        ] {
            let mut arguments = json!({"handle": read});
            if !count.is_null() {
                arguments["count"] = count.clone();
            }
            self.ask(&format!("read {count}"), "guest-file-read", arguments)?;
        }
        for (offset, whence) in [
            (0, json!(0)),
            (3, json!("set")),
            (2, json!("cur")),
            (-1, json!("end")),
            (1, json!(1)),
            (0, json!(2)),
            (-100, json!("cur")),
            (0, json!(7)),
            (0, json!("bad")),
            (0, json!([])),
        ] {
            let arguments = json!({"handle": read, "offset": offset, "whence": whence});
            self.ask(
                &format!("seek {offset} {whence}"),
                "guest-file-seek",
                arguments,
            )?;
        }
        let arguments = json!({"handle": read, "offset": 0});
        self.ask("seek from nowhere", "guest-file-seek", arguments)?;
        let arguments = json!({"handle": read, "buf-b64": "eA=="});
        self.ask(
            "write to what was opened for reading",
            "guest-file-write",
            arguments,
        )?;
        self.ask("flush", "guest-file-flush", json!({"handle": read}))?;
        self.ask("close", "guest-file-close", json!({"handle": read}))?;
        for name in ["guest-file-read", "guest-file-flush", "guest-file-close"] {
            self.all(
                name,
                &[json!({"handle": 77}), json!({}), json!({"handle": "x"})],
            )?;
        }
        let write = self.open(json!({"path": "/tmp/f/write", "mode": "w+"}))?;
        for more in [
            json!({"buf-b64": "YWJjZGVm"}),
            json!({"buf-b64": "YWJjZGVm", "count": 2}),
            json!({"buf-b64": "YWJjZGVm", "count": 7}),
            json!({"buf-b64": "YWJjZGVm", "count": -1}),
            json!({"buf-b64": "!!!"}),
            json!({"buf-b64": ""}),
            json!({}),
        ] {
            let mut arguments = more.clone();
            arguments["handle"] = write.clone();
            self.ask(&format!("write {more}"), "guest-file-write", arguments)?;
        }
        self.ask(
            "read at the end",
            "guest-file-read",
            json!({"handle": write}),
        )?;
        self.ask("flush", "guest-file-flush", json!({"handle": write}))?;
        self.look("cat /tmp/f/write")?;
        let arguments = json!({"handle": write, "offset": 0, "whence": "set"});
        self.ask("seek back", "guest-file-seek", arguments)?;
        self.ask(
            "read what was written",
            "guest-file-read",
            json!({"handle": write}),
        )?;
        self.ask("close", "guest-file-close", json!({"handle": write}))?;
        let append = self.open(json!({"path": "/tmp/f/write", "mode": "a"}))?;
        let arguments = json!({"handle": append, "buf-b64": "Lg=="});
        self.ask("append", "guest-file-write", arguments)?;
        self.ask("close", "guest-file-close", json!({"handle": append}))?;
        self.look("cat /tmp/f/write")
    }

    /// Starts a program and keeps how it ended.
    fn program(&mut self, step: &str, arguments: Value) -> Result<Value> {
        let reply = self.agent.ask("guest-exec", arguments)?;
        let pid = reply["return"]["pid"].clone();
        if !pid.is_i64() {
            self.keep(step, reply.clone());
            return Ok(reply);
        }
        self.keep(&format!("{step}: started"), reply["return"].clone());
        let agent = &mut *self.agent;
        let ended = wait::until("a program to end", wait::STEP, || {
            let status = agent.ask("guest-exec-status", json!({ "pid": pid }))?;
            Ok((status["return"]["exited"] == true).then_some(status))
        })?;
        self.keep(step, ended.clone());
        self.ask(
            &format!("{step}: asked again"),
            "guest-exec-status",
            json!({ "pid": pid }),
        )?;
        Ok(ended)
    }

    fn programs(&mut self) -> Result<()> {
        let shell =
            |line: &str| json!({"path": "/bin/sh", "arg": ["-c", line], "capture-output": true});
        for (step, arguments) in [
            (
                "echo",
                json!({"path": "/bin/echo", "arg": ["hi", "there"], "capture-output": true}),
            ),
            (
                "by PATH",
                json!({"path": "echo", "arg": ["-x", "--name"], "capture-output": true}),
            ),
            ("nothing kept", json!({"path": "/bin/echo", "arg": ["hi"]})),
            ("status 3", shell("exit 3")),
            ("killed", shell("kill -9 $$")),
            ("both streams", shell("echo out; echo err >&2")),
            (
                "its own name",
                shell("echo $0; cat /proc/self/oom_score_adj"),
            ),
            ("where and how", shell("pwd; readlink /proc/$$/fd/0")),
            (
                "input",
                json!({"path": "/bin/cat", "input-data": "aW4=", "capture-output": true}),
            ),
            (
                "input that nobody reads",
                json!({"path": "/bin/true", "input-data": "aW4="}),
            ),
            (
                "environment",
                json!({"path": "/bin/env", "env": ["A=b", "C=d=e"], "capture-output": true}),
            ),
            ("not there", json!({"path": "/no/such/program"})),
            ("not there by PATH", json!({"path": "no-such-program"})),
            ("not to be run", json!({"path": "/etc/passwd"})),
            ("bad input", json!({"path": "/bin/cat", "input-data": "%%"})),
            ("no path", json!({})),
            ("no list", json!({"path": "/bin/true", "arg": "x"})),
            ("no text", json!({"path": "/bin/true", "arg": [5]})),
            (
                "no flag",
                json!({"path": "/bin/true", "capture-output": "x"}),
            ),
            ("more", json!({"path": "/bin/true", "more": 1})),
        ] {
            self.program(step, arguments)?;
        }
        self.all(
            "guest-exec-status",
            &[json!({"pid": 1}), json!({}), json!({"pid": "x"})],
        )?;
        let reply = self.agent.ask(
            "guest-exec",
            shell("while [ ! -e /tmp/go ]; do usleep 10000; done"),
        )?;
        let pid = reply["return"]["pid"].clone();
        self.ask(
            "a program that runs",
            "guest-exec-status",
            json!({ "pid": pid }),
        )?;
        self.run("touch /tmp/go")?;
        let agent = &mut *self.agent;
        wait::until("the program to end", wait::STEP, || {
            let status = agent.ask("guest-exec-status", json!({ "pid": pid }))?;
            Ok((status["return"]["exited"] == true).then_some(()))
        })?;
        self.run("rm /tmp/go")?;
        // One byte more than is kept.
        let reply = self.agent.ask(
            "guest-exec",
            shell("head -c 16777217 /dev/zero; echo end >&2"),
        )?;
        let pid = reply["return"]["pid"].clone();
        let agent = &mut *self.agent;
        let mut ended = wait::until("much output", wait::STEP, || {
            let status = agent.ask("guest-exec-status", json!({ "pid": pid }))?;
            Ok((status["return"]["exited"] == true).then_some(status))
        })?;
        let length = ended["return"]["out-data"].as_str().map(str::len);
        ended["return"]["out-data"] = json!(length);
        self.keep("more output than is kept", ended);
        Ok(())
    }

    fn accounts(&mut self) -> Result<()> {
        self.run("rm -rf /home/ann/.ssh; sed -i 's/^ann:[^:]*:/ann:*:/' /etc/shadow")?;
        let (keys, add, remove) = (
            "guest-ssh-get-authorized-keys",
            "guest-ssh-add-authorized-keys",
            "guest-ssh-remove-authorized-keys",
        );
        let ann = json!({"username": "ann"});
        let with = |list: &[&str]| json!({"username": "ann", "keys": list});
        self.ask("no keys yet", keys, ann.clone())?;
        self.ask("remove from nothing", remove, with(&["ssh-rsa A"]))?;
        self.ask("add two", add, with(&["ssh-rsa A", "ssh-rsa B"]))?;
        self.look("grep . /home/ann/.ssh/authorized_keys; stat -c '%a %u %g' /home/ann/.ssh /home/ann/.ssh/authorized_keys")?;
        self.run("printf '\\n# a comment\\n\\n' >>/home/ann/.ssh/authorized_keys")?;
        self.ask("add one again", add, with(&["ssh-rsa B", "ssh-rsa C"]))?;
        self.ask("three", keys, ann.clone())?;
        self.ask("remove one", remove, with(&["ssh-rsa A", "ssh-rsa Z"]))?;
        self.ask("two", keys, ann.clone())?;
        let reset = json!({"username": "ann", "keys": ["ssh-rsa D"], "reset": true});
        self.ask("reset", add, reset)?;
        self.ask("one", keys, ann)?;
        self.look("grep . /home/ann/.ssh/authorized_keys; stat -c '%a %u %g' /home/ann/.ssh /home/ann/.ssh/authorized_keys")?;
        self.all(keys, &[json!({"username": "nobody-here"}), json!({})])?;
        self.all(
            add,
            &[
                json!({"username": "nobody-here", "keys": ["ssh-rsa A"]}),
                with(&["#x"]),
                with(&["a\nb"]),
                json!({"username": "ann"}),
                json!({"username": "ann", "keys": "x"}),
            ],
        )?;
        self.all(remove, &[with(&["#x"]), json!({"username": "ann"})])?;

        let password = "guest-set-user-password";
        for (step, crypted, text) in [
            ("a password", false, "bmV3"),
            ("a crypted password", true, "JDYkYSRi"),
        ] {
            let arguments = json!({"username": "ann", "password": text, "crypted": crypted});
            self.ask(step, password, arguments)?;
            // The salt is another each time.
            self.look("awk -F: '$1 == \"ann\" {print length($2)}' /etc/shadow")?;
        }
        self.look("grep ^ann: /etc/shadow | cut -d : -f 2")?;
        let wrong =
            |user: &str, text: &str| json!({"username": user, "password": text, "crypted": false});
        self.all(
            password,
            &[
                wrong("nobody-here", "YQ=="),
                wrong("ann", "%%%"),
                wrong("ann", "YQpi"),
                wrong("an:n", "YQ=="),
                wrong("an\nn", "YQ=="),
                json!({"username": "ann", "password": "YQ=="}),
            ],
        )
    }

    fn processors(&mut self) -> Result<()> {
        let one = |id: i64, online: bool| json!({"logical-id": id, "online": online});
        let (first, last) = (one(0, true), one(1, true));
        self.all(
            "guest-set-vcpus",
            &[
                json!({}),
                json!({"vcpus": []}),
                json!({"vcpus": [{"logical-id": 0}]}),
                json!({"vcpus": [one(77, true)]}),
                json!({"vcpus": [one(77, false)]}),
                json!({"vcpus": [first, one(77, true)]}),
                json!({"vcpus": [one(0, false)]}),
                json!({"vcpus": [one(1, false)]}),
            ],
        )?;
        self.ask("one processor is off", "guest-get-vcpus", json!({}))?;
        self.ask("on again", "guest-set-vcpus", json!({"vcpus": [last]}))?;
        self.ask("both are on", "guest-get-vcpus", json!({}))?;
        Ok(())
    }

    fn time_and_power(&mut self) -> Result<()> {
        self.run("rm -f /sbin/shutdown /tmp/shutdown")?;
        self.ask("shutdown without shutdown", "guest-shutdown", json!({}))?;
        self.run("cp /tmp/shutdown.sh /sbin/shutdown")?;
        self.all(
            "guest-set-time",
            &[
                json!({"time": 1_800_000_000_000_000_000_i64}),
                json!({"time": -1}),
                json!({"time": "x"}),
            ],
        )?;
        // The first digits: some hours are the same.
        self.look("date +%s | cut -c 1-5")?;
        self.ask("by the hardware clock", "guest-set-time", json!({}))?;
        // The first digits: some hours are the same.
        self.look("date +%s | cut -c 1-5")?;
        self.all(
            "guest-shutdown",
            &[json!({"mode": "now"}), json!({"mode": 5})],
        )?;
        for arguments in [
            json!({}),
            json!({"mode": "halt"}),
            json!({"mode": "powerdown"}),
            json!({"mode": "reboot"}),
        ] {
            // No reply on success: the next one is the ping's.
            let request = json!({"execute": "guest-shutdown", "arguments": arguments});
            let ping = json!({"execute": "guest-ping", "id": "after"});
            let reply = self.agent.ask_text(&format!("{request}\n{ping}"))?;
            self.keep(&format!("shutdown {arguments}"), reply);
        }
        wait::until("four shutdowns", wait::STEP, || {
            let lines = (self.shell)("cat /tmp/shutdown 2>/dev/null | wc -l")?;
            Ok((lines.trim() == "4").then_some(()))
        })?;
        self.look("cat /tmp/shutdown")?;
        self.ask(
            "hybrid sleep without systemd",
            "guest-suspend-hybrid",
            json!({}),
        )?;
        self.ask(
            "sleep on a disk without swap",
            "guest-suspend-disk",
            json!({}),
        )?;
        Ok(())
    }

    fn freeze(&mut self) -> Result<()> {
        self.ask("thawed", "guest-fsfreeze-status", json!({}))?;
        self.ask("nothing to thaw", "guest-fsfreeze-thaw", json!({}))?;
        self.all(
            "guest-fsfreeze-freeze-list",
            &[
                json!({"mountpoints": ["/nowhere"]}),
                json!({"mountpoints": []}),
                json!({"mountpoints": "x"}),
                json!({"mountpoints": [5]}),
            ],
        )?;
        self.ask("still thawed", "guest-fsfreeze-status", json!({}))?;
        self.ask(
            "freeze one",
            "guest-fsfreeze-freeze-list",
            json!({"mountpoints": ["/mnt/a"]}),
        )?;
        self.ask("frozen", "guest-fsfreeze-status", json!({}))?;
        self.ask("info while frozen", "guest-info", json!({}))?;
        let info = self.agent.ask("guest-info", json!({}))?;
        let commands = info["return"]["supported_commands"].as_array();
        let disabled = commands.context("commands")?.iter();
        let disabled = disabled.filter(|command| command["enabled"] == false);
        let mut names: Vec<_> = disabled.filter_map(|c| c["name"].as_str()).collect();
        names.sort_unstable();
        for name in names {
            if !["guest-get-devices", "guest-get-load"].contains(&name) {
                self.ask(&format!("{name} while frozen"), name, json!({}))?;
            }
        }
        self.ask("ping while frozen", "guest-ping", json!({}))?;
        self.text(r#"{"execute":"guest-sync","arguments":{"id":5}}"#)?;
        self.ask("thaw one", "guest-fsfreeze-thaw", json!({}))?;
        self.ask("thaw again", "guest-fsfreeze-thaw", json!({}))?;
        self.ask("freeze all", "guest-fsfreeze-freeze", json!({}))?;
        self.ask("freeze twice", "guest-fsfreeze-freeze", json!({}))?;
        self.ask("thaw all", "guest-fsfreeze-thaw", json!({}))?;
        self.ask("all thawed", "guest-fsfreeze-status", json!({}))?;
        Ok(())
    }
}
