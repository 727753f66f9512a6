//! `make writer-figures`: what clients of a database see of a set: throughput and the longest stall, with our writer, without one,
//! with the stock guest agent, and with no set at all.
//!
//! Started by make; writes `target/bench/writer-figures.json` and prints a table for each database. The four take turns of equal
//! length in one machine under one load, so that what else the host does meets all of them. Times are the guest's.
//! `VMSHADOW_FIGURE_ROUNDS` says how often, 10 by default; `writer-figures NAME...` measures these alone.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vmshadow_tests::guest_protocol::{Ack, QGA_PORT};
use vmshadow_tests::harness::database::Kind;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::figures::Figures;
use vmshadow_tests::harness::image;
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::wait;

const ROUNDS: usize = 10;
/// Has no server.
const SQLITE: &str = "sqlite";
const CLIENTS: usize = 3;
/// Length of a turn; a set takes a part of it.
const TURN: Duration = Duration::from_secs(4);
const KINDS: [Kind; 6] = [
    Kind::Postgresql,
    Kind::Mariadb,
    Kind::Mysql,
    Kind::Redis,
    Kind::RedisDump,
    Kind::Etcd,
];

/// Who makes the set of a turn.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Nobody.
    NoSet,
    /// `vmshadow create`: writers, file systems.
    Writer,
    /// `vmshadow create --level filesystem`: file systems alone.
    NoWriter,
    /// The stock agent freezes, `vmshadow create --level crash`, the stock agent thaws.
    StockAgent,
}

impl Way {
    const ALL: [Self; 4] = [Self::NoSet, Self::Writer, Self::NoWriter, Self::StockAgent];

    fn name(self) -> &'static str {
        match self {
            Self::NoSet => "no set",
            Self::Writer => "our writer",
            Self::NoWriter => "no writer",
            Self::StockAgent => "qemu-ga",
        }
    }
}

/// Has QEMU's agent take this port over from ours, which stays on the others. Returns a client that it has answered.
fn stock_agent(site: &Site) -> Result<QgaClient> {
    site.vm
        .shell("echo '--qga-port none' >/etc/vmshadow/agent.args && killall guest-agent")?;
    // The port is one program's at a time: it begins when ours has let go. Asked earlier, ours might answer, or take the
    // request with it.
    let port = format!("/dev/virtio-ports/{QGA_PORT}");
    let command = format!(
        "until /usr/sbin/qemu-ga -m virtio-serial -p {port} -t /run >/tmp/qemu-ga.log 2>&1; do usleep 100000; done"
    );
    drop(site.vm.guest()?.start(&command)?);
    site.vm
        .shell(
            "until for p in $(pidof qemu-ga); do ls -l /proc/$p/fd; done 2>&1 | grep -q vport; do usleep 100000; done",
        )
        .with_context(|| site.vm.shell("cat /tmp/qemu-ga.log").unwrap_or_default())?;
    QgaClient::connect(&site.vm.port(QGA_PORT)).with_context(|| site.log())
}

fn ask(agent: &mut QgaClient, command: &str) -> Result<()> {
    let reply = agent.ask(command, json!({}))?;
    ensure!(reply.get("return").is_some(), "{command}: {reply}");
    Ok(())
}

fn set(site: &Site, agent: &mut QgaClient, way: Way) -> Result<()> {
    match way {
        Way::NoSet => {}
        Way::Writer => drop(site.create(&[])?),
        Way::NoWriter => drop(site.try_create(&["--level", "filesystem"])?.succeeded()?),
        Way::StockAgent => {
            ask(agent, "guest-fsfreeze-freeze")?;
            let made = site.try_create(&["--level", "crash"]);
            ask(agent, "guest-fsfreeze-thaw")?;
            drop(made?.succeeded()?);
        }
    }
    Ok(())
}

/// The longest time in which a client had no acknowledgement, milliseconds, from the last one before the turn on.
fn longest_stall_ms(acks: &[Ack], from: usize) -> f64 {
    let mut last: BTreeMap<usize, u64> = BTreeMap::new();
    let mut longest = 0;
    for (number, ack) in acks.iter().enumerate() {
        let before = last.insert(ack.database, ack.acked_us);
        if let Some(before) = before.filter(|_| number >= from) {
            longest = longest.max(ack.acked_us.saturating_sub(before));
        }
    }
    Duration::from_micros(longest).as_secs_f64() * 1e3
}

fn turn(site: &Site, agent: &mut QgaClient, load: &Load, way: Way) -> Result<(f64, f64)> {
    let from = load.acks().len();
    let begin = Instant::now();
    set(site, agent, way)?;
    // The turn is of one length whatever the set took; a set that took longer has its own.
    wait::until("the end of the turn", wait::STEP, || {
        Ok((begin.elapsed() >= TURN).then_some(()))
    })?;
    let acks = load.acks();
    let took = begin.elapsed().as_secs_f64();
    let count = u32::try_from(acks.len() - from)?;
    if count == 0 {
        bail!("no transaction in a turn");
    }
    Ok((f64::from(count) / took, longest_stall_ms(&acks, from)))
}

fn of_server(kind: Kind, rounds: usize) -> Result<Value> {
    let site = Site::start_database(kind)?;
    let mut agent = stock_agent(&site)?;
    site.database_writer(kind)?;
    let load = Load::start_clients(&site.vm, kind.name(), CLIENTS)?;
    measure(kind.name(), &site, &mut agent, &load, rounds)
}

/// Two databases on two disks, with a client each.
fn of_sqlite(rounds: usize) -> Result<Value> {
    let disks = [("a", FileSystem::Ext4), ("b", FileSystem::Xfs)];
    let site = Site::start_in_databases_guest("sqlite", &disks)?;
    let mut agent = stock_agent(&site)?;
    let load = site.load()?;
    site.sqlite_writer()?;
    measure(SQLITE, &site, &mut agent, &load, rounds)
}

fn measure(
    name: &str,
    site: &Site,
    agent: &mut QgaClient,
    load: &Load,
    rounds: usize,
) -> Result<Value> {
    let (mut rates, mut stalls) = (Figures::default(), Figures::default());
    for _ in 0..rounds {
        for way in Way::ALL {
            let (rate, stall) = turn(site, agent, load, way)?;
            rates.add(way.name(), rate);
            stalls.add(way.name(), stall);
        }
    }
    println!(
        "\n{name}: transactions per second in a turn of {} s",
        TURN.as_secs()
    );
    let mut report = serde_json::Map::new();
    println!(
        "{:14}{:>14}{:>16}{:>16}",
        "", "tx/s, p50", "stall p50, ms", "stall max, ms"
    );
    for ((name, rate), (_, stall)) in rates.summaries().into_iter().zip(stalls.summaries()) {
        println!(
            "{name:14}{:>14.1}{:>16.0}{:>16.0}",
            rate.p50, stall.p50, stall.max
        );
        report.insert(
            name,
            json!({ "transactions-per-second": rate, "longest-stall-ms": stall }),
        );
    }
    Ok(Value::Object(report))
}

fn main() -> Result<()> {
    let rounds = match std::env::var("VMSHADOW_FIGURE_ROUNDS") {
        Ok(text) => text.parse().context("VMSHADOW_FIGURE_ROUNDS")?,
        Err(_) => ROUNDS,
    };
    let mut report = serde_json::Map::new();
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    let names = KINDS.map(Kind::name).into_iter().chain([SQLITE]);
    let names: Vec<&str> = names.collect();
    if let Some(unknown) = chosen.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("{unknown} is none of {}", names.join(", "));
    }
    let is_chosen = |name: &str| chosen.is_empty() || chosen.iter().any(|chosen| chosen == name);
    for kind in KINDS.into_iter().filter(|kind| is_chosen(kind.name())) {
        if kind == Kind::Mysql && !image::has_mysql()? {
            eprintln!("SKIPPED: no MySQL in target/mysql (`images/build.sh mysql`)");
            continue;
        }
        report.insert(kind.name().to_owned(), of_server(kind, rounds)?);
    }
    if is_chosen(SQLITE) {
        report.insert(SQLITE.to_owned(), of_sqlite(rounds)?);
    }
    let directory = image::target().join("bench");
    fs::create_dir_all(&directory)?;
    let path = directory.join("writer-figures.json");
    let whole = json!({
        "accelerator": image::accelerator()?.name(),
        "rounds": rounds,
        "clients": CLIENTS,
        "turn-s": TURN.as_secs(),
        "databases": report,
    });
    fs::write(&path, serde_json::to_string_pretty(&whole)? + "\n")?;
    println!("\n{}", path.display());
    Ok(())
}
