//! Puts the rooms together: state directory, leftovers, helper, threads.
//!
//! Called by `main`. Everything that is needed later is opened and started here, before anything can be frozen.

use crate::clock::Alarm;
use crate::config::Agent;
use crate::filesystem::plan::Sources;
use crate::hold::client::Holder;
use crate::hold::ledger::{self, Recovered, Unrecovered};
use crate::journal;
use crate::native;
use crate::qga::{self, policy::Policy};
use crate::quiesce::actor::{Actor, Settings, sink};
use crate::quiesce::service::{Service, Signal};
use crate::transport::Endpoint;
use crate::writer::registry::Registry;
use crate::writer::script::control_group::ControlGroup;
use crate::writer::script::{Foreign, Sources as Scripts, left_over};
use crate::writer::socket;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// How long a dying helper is waited for at start.
const RECOVERY: Duration = Duration::from_secs(10);

fn sources(config: &Agent) -> Sources {
    Sources {
        proc: PathBuf::from("/proc"),
        sys: PathBuf::from("/sys"),
        only_under: config.only_under.clone(),
    }
}

/// Takes the state directory for this process alone. The lock lasts as long as the descriptor.
fn lock(state_dir: &Path) -> io::Result<OwnedFd> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(state_dir)?;
    let file: OwnedFd = fs::File::create(state_dir.join("agent.lock"))?.into();
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| io::Error::other("another guest-agent runs on this state directory"))?;
    Ok(file)
}

/// Undoes what a killed agent left: frozen file systems, frozen script writers. Returns how many file systems it could not reach.
fn undo_leftovers(config: &Agent) -> io::Result<usize> {
    let thawed = ledger::recover(&config.state_dir, &sources(config), RECOVERY);
    if let Err(error @ Unrecovered::StillFrozen(_)) = thawed {
        // No script is started while a file system is frozen.
        return Err(io::Error::other(error));
    }
    let aborted = left_over::recover(&config.state_dir)?;
    let Recovered { thawed, unreached } = thawed.map_err(io::Error::other)?;
    if thawed + aborted > 0 {
        journal::note(format_args!(
            "a killed agent left {thawed} file systems frozen and {aborted} script writers waiting; undone"
        ));
    }
    Ok(unreached)
}

/// `--thaw-leftovers`.
pub fn thaw_leftovers(config: &Agent) -> io::Result<()> {
    let _lock = lock(&config.state_dir)?;
    match undo_leftovers(config)? {
        0 => Ok(()),
        unreached => Err(io::Error::other(format!(
            "{unreached} file systems that a killed agent froze cannot be reached, and may be frozen still"
        ))),
    }
}

/// Runs the agent for ever.
pub fn run(config: Agent) -> io::Result<()> {
    let _lock = lock(&config.state_dir)?;
    // What cannot be reached has been told, and is no reason to leave the rest of the guest without an agent.
    undo_leftovers(&config)?;
    ControlGroup::sweep();
    fs::write("/proc/self/oom_score_adj", "-900").unwrap_or(());
    // A descriptor for each file system, and for each writer.
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).unwrap_or(());

    let (sender, receiver) = channel();
    let service = Service::new(sender);
    let paths = sources(&config);
    let holder = Holder::start(&config.state_dir, 0, sink(&service))?;
    let registry = Arc::new(Registry::new(
        Scripts {
            directory: Some(config.writers_dir.clone()),
            foreign: Foreign {
                hooks: config.foreign_hooks.clone(),
                root: config.foreign_root.clone(),
                fsfreeze_hook: config.fsfreeze_hook.clone(),
            },
        },
        config.state_dir.clone(),
    ));
    let alarm = Arc::new(Alarm::new()?);
    let actor = Actor::new(
        service.clone(),
        receiver,
        Arc::clone(&registry),
        paths.clone(),
        Settings {
            exclude_filesystems: config.exclude_filesystem.clone(),
            qga_hold_ms: config.qga_hold_ms,
            state_dir: config.state_dir.clone(),
            not_to_snapshot_dir: config.not_to_snapshot_dir.clone(),
            keep_swap: config.keep_swap,
        },
        holder,
        Arc::clone(&alarm),
    );
    let watched = service.clone();
    start("window", move || watch(&alarm, &watched))?;

    let socket_path = config
        .writer_socket
        .clone()
        .unwrap_or_else(|| config.state_dir.join("writers.sock"));
    socket::listen(&socket_path, &config.allow_dir, registry, service.clone())?;

    let policy = Policy::new(config.block_rpcs.clone(), config.allow_rpcs.clone());
    for port in config.qga_port {
        if port == Endpoint::Port("none".into()) {
            continue;
        }
        let (service, policy) = (service.clone(), policy.clone());
        let sources = paths.clone();
        start("qga", move || {
            let error = qga::run(&port, &service, &sources, policy);
            journal::note(format_args!("QEMU guest agent protocol: {error}"));
        })?;
    }
    let bridge = Arc::new(native::Bridge::default());
    for port in config.port {
        let (service, bridge) = (service.clone(), Arc::clone(&bridge));
        start("native", move || {
            let error = native::run(&port, &service, &bridge);
            journal::note(format_args!("native protocol: {error}"));
        })?;
    }
    // All that is mapped now is read in and stays; what comes later stays once it is touched.
    mlockall(MlockAllFlags::CURRENT)
        .and_then(|()| mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT))
        .unwrap_or_else(|error| journal::note(format_args!("memory is not locked: {error}")));
    actor.run();
    Ok(())
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
}

/// Tells the actor when the alarm of the writers' windows rings.
fn watch(alarm: &Alarm, service: &Service) {
    loop {
        let mut polled = [PollFd::new(alarm, PollFlags::IN)];
        if poll(&mut polled, None).is_ok() {
            let mut count = [0; 8];
            // Not readable any more if it has been set anew meanwhile.
            if rustix::io::read(alarm.as_fd(), &mut count).is_ok() {
                service.send(Signal::WindowOver);
            }
        }
    }
}
