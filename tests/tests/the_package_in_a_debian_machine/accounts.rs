//! Passwords and keys of a real account: QEMU's own agent and ours are asked the same, and the guest's own PAM says what opens it.
//!
//! Called by the scenario while both agents run.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::guest_protocol::{LOAD_PORT, QGA_PORT};
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::wait;

/// What is set for `ann`, in base64, and what must open the account then: the step, the password, whether it is crypted, the secret.
const PASSWORDS: &[(&str, &str, bool, &str)] = &[
    ("a password", "bmV3IHNlY3JldA==", false, "new secret"),
    ("a colon in it", "YTpi", false, "a:b"),
    ("no text", "//79", false, "\\377\\376\\375"),
    ("crypted", CRYPTED, true, "other secret"),
];

/// What is refused: the step, the user, the password, whether it is crypted.
const REFUSED: &[(&str, &str, &str, bool)] = &[
    ("unknown user", "nobody-here", "YQ==", false),
    ("crypted, unknown user", "nobody-here", CRYPTED, true),
    ("no user", "", "YQ==", false),
    ("a user of two lines", "ann\nx", "YQ==", false),
    ("a user with a colon", "ann:x", "YQ==", false),
    ("bad base64", "ann", "%%%", false),
    ("a newline in it", "ann", "d2l0aApuZXdsaW5l", false),
    ("a newline at its end", "ann", "YQo=", false),
    ("crypted, two lines", "ann", "YQpi", true),
];

/// crypt(3) of `other secret` with the salt `vmshadow` by SHA-512, in base64: see [`crypted_is_what_it_says`].
const CRYPTED: &str = "JDYkdm1zaGFkb3ckQUMzT1ZPNEEwbjhDTlRtN3EuWXpSUWdMcVZGOVYxcC5GZy5mbkt3MjRIaVRwejBFUFNZWlBvMk9KaFVEZTE1VnpnM01NUkxqR3B3MEVaV01PZlhlai4=";

/// Where ours, which is asked first, does otherwise: why, the password in base64, and what opens the account after theirs and after ours.
const DIFFERENCES: &[(&str, &str, &str, &str)] = &[
    (
        "theirs loses what stands behind the last four digits, and says nothing if something is left",
        "bG9uZ2Vy/w",
        "longer",
        "longer\\377",
    ),
    (
        "theirs sets what stands before a zero: a shorter password than was asked for",
        "YQBi",
        "a",
        "longer",
    ),
];

/// Both are asked; replies and accounts are the same.
pub(crate) fn are_set_as_qemus_own_agent_sets_them(site: &Site) -> Result<()> {
    site.vm.shell("useradd -m -s /bin/sh ann")?;
    crypted_is_what_it_says(site)?;
    let theirs = run(site, LOAD_PORT)?;
    let ours = run(site, QGA_PORT)?;
    ensure!(theirs.len() == ours.len(), "{theirs:#?}\n{ours:#?}");
    let mut different = Vec::new();
    for (theirs, ours) in theirs.iter().zip(&ours) {
        if theirs != ours {
            different.push(format!("theirs {theirs:?}\nours   {ours:?}"));
        }
    }
    eprintln!("{} replies and looks at accounts compared", ours.len());
    ensure!(different.is_empty(), "{}", different.join("\n"));
    ours_sets_no_part_of_a_password(site)
}

fn crypted_is_what_it_says(site: &Site) -> Result<()> {
    let made = site
        .vm
        .shell("perl -e 'print crypt(\"other secret\", q($6$vmshadow$))' | base64 -w 0")?;
    ensure!(made == CRYPTED, "the test's own hash: {made}");
    Ok(())
}

/// Passwords of which theirs makes others; ours takes the whole, or refuses.
fn ours_sets_no_part_of_a_password(site: &Site) -> Result<()> {
    for (why, password, theirs, ours) in DIFFERENCES {
        for (port, secret) in [(QGA_PORT, ours), (LOAD_PORT, theirs)] {
            let mut agent = QgaClient::connect(&site.vm.port(port))?;
            let arguments = json!({"username": "ann", "password": password, "crypted": false});
            let reply = agent.ask("guest-set-user-password", arguments)?;
            let status = opened_by(site, secret)?;
            ensure!(
                status == 0,
                "{why}: {port}: {reply}, and not opened by {secret:?}"
            );
        }
    }
    Ok(())
}

/// As PAM asks when somebody logs in: 0 if this opens the account.
fn opened_by(site: &Site, secret: &str) -> Result<i32> {
    let opens = format!("printf '{secret}\\0' | unix_chkpwd ann nonull");
    Ok(site.vm.guest()?.start(&opens)?.wait(wait::STEP)?.status)
}

/// Everything that one agent is asked, and what it has made of the account, in order.
fn run(site: &Site, port: &str) -> Result<Vec<(String, Value)>> {
    let mut agent = QgaClient::connect(&site.vm.port(port))?;
    let mut seen = Vec::new();
    site.vm
        .shell("usermod -p '*' ann && chage -d 2020-01-01 ann && rm -rf /home/ann/.ssh")?;
    for (step, password, crypted, secret) in PASSWORDS {
        let arguments = json!({"username": "ann", "password": password, "crypted": crypted});
        let reply = agent.ask("guest-set-user-password", arguments)?;
        seen.push(((*step).to_owned(), reply));
        let status = opened_by(site, secret)?;
        ensure!(
            status == 0,
            "{port}, {step}: the account is not opened by {secret:?}: {seen:#?}"
        );
        // The salt is another each time: of the hash its kind alone is the same.
        let shadow = site.vm.shell(
            "getent shadow ann | cut -d : -f 1,3-; getent shadow ann | cut -d : -f 2 | cut -c 1-3; getent shadow | grep -v ^ann: | sha256sum; \
             stat -c '%a %u %g' /etc/shadow",
        )?;
        seen.push((format!("{step}: /etc/shadow"), json!(shadow)));
    }
    for (step, user, password, crypted) in REFUSED {
        let arguments = json!({"username": user, "password": password, "crypted": crypted});
        let reply = agent.ask("guest-set-user-password", arguments)?;
        ensure!(reply.get("error").is_some(), "{port}, {step}: {reply}");
        seen.push(((*step).to_owned(), reply));
    }
    // None of these has changed anything.
    let hash = site
        .vm
        .shell("getent shadow ann | cut -d : -f 2 | base64 -w 0")?;
    seen.push(("the hash that was given".to_owned(), json!(hash)));
    keys(site, &mut agent, &mut seen).with_context(|| port.to_owned())?;
    Ok(seen)
}

fn keys(site: &Site, agent: &mut QgaClient, seen: &mut Vec<(String, Value)>) -> Result<()> {
    let with = |user: &str, keys: &[&str]| json!({"username": user, "keys": keys});
    let (get, add, remove) = (
        "guest-ssh-get-authorized-keys",
        "guest-ssh-add-authorized-keys",
        "guest-ssh-remove-authorized-keys",
    );
    let reset = json!({"username": "ann", "keys": ["ssh-rsa E e"], "reset": true});
    for (name, arguments) in [
        (get, json!({"username": "ann"})),
        (remove, with("ann", &["ssh-rsa A"])),
        (add, with("ann", &["ssh-rsa A a", "ssh-ed25519 B b"])),
        (add, with("ann", &["ssh-ed25519 B b", "ssh-rsa C c"])),
        (get, json!({"username": "ann"})),
        (remove, with("ann", &["ssh-rsa A a", "ssh-rsa Z"])),
        (get, json!({"username": "ann"})),
        (add, reset),
        (get, json!({"username": "ann"})),
        (add, with("nobody-here", &["ssh-rsa A"])),
        (add, with("ann", &["# ssh-rsa A"])),
        // An account whose home is not there, and one whose home is not its own.
        (add, with("lp", &["ssh-rsa A"])),
        (get, json!({"username": "lp"})),
        (add, with("sys", &["ssh-rsa A"])),
    ] {
        let reply = agent.ask(name, arguments.clone())?;
        seen.push((format!("{name} {arguments}"), reply));
        // A question changes nothing. The last line of their file has no end: `grep` gives it one.
        if name == get {
            continue;
        }
        let files = site.vm.shell(
            "cd /home/ann; stat -c '%n %F %a %u %g' .ssh .ssh/* 2>/dev/null; grep . .ssh/authorized_keys 2>/dev/null; stat -c '%n %a %u %g' /dev/.ssh 2>/dev/null; true",
        )?;
        seen.push((format!("{name} {arguments}: files"), json!(files)));
    }
    site.vm.shell("rm -rf /dev/.ssh")?;
    Ok(())
}
