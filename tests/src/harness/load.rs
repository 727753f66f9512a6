//! Transactions in a running guest, and what it acknowledged.
//!
//! Called by scenarios, the demo and the measuring commands. A thread reads the acknowledgements
//! as they come; the load in the guest never waits for it.

use std::io::{BufRead, BufReader};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::guest::Running;
use super::vm::Vm;
use super::wait;
use crate::guest_protocol::{Ack, LOAD_PORT};

/// A load that runs.
#[derive(Debug)]
pub struct Load {
    acks: Arc<Mutex<Vec<Ack>>>,
    running: Running,
    port: UnixStream,
    program: &'static str,
    databases: usize,
}

impl Load {
    /// Starts it on these databases (paths in the guest) and waits for the first acknowledgements.
    pub fn start(vm: &Vm, databases: &[&str]) -> Result<Self> {
        let command = format!(
            "exec guest-load /dev/virtio-ports/{LOAD_PORT} {}",
            databases.join(" ")
        );
        Self::start_command(vm, "guest-load", &command, databases.len())
    }

    /// Starts the load of a database server that runs; each of its clients takes the place of a database.
    pub fn start_clients(vm: &Vm, kind: &str, clients: usize) -> Result<Self> {
        let command = format!("database load {kind} - /dev/virtio-ports/{LOAD_PORT} {clients}");
        Self::start_command(vm, "guest-database-load", &command, clients)
    }

    /// Starts it by a command of the caller's, which runs as long as the load does; `program` acknowledges transactions of
    /// so many databases, and is killed at the end.
    pub fn start_command(
        vm: &Vm,
        program: &'static str,
        command: &str,
        databases: usize,
    ) -> Result<Self> {
        let port = UnixStream::connect(vm.port(LOAD_PORT))?;
        let acks = Arc::<Mutex<Vec<Ack>>>::default();
        let list = Arc::clone(&acks);
        let reader = BufReader::new(port.try_clone()?);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                match serde_json::from_str::<Ack>(&line) {
                    Ok(ack) => list
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(ack),
                    Err(error) => eprintln!("harness: {error} in the acknowledgement {line:?}"),
                }
            }
        });
        let load = Self {
            acks,
            running: vm.guest()?.start(command)?,
            port,
            program,
            databases,
        };
        load.wait_for_more(20).with_context(|| vm.log())?;
        Ok(load)
    }

    /// Every acknowledgement so far, in the order they came.
    #[must_use]
    pub fn acks(&self) -> Vec<Ack> {
        self.acks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The highest acknowledged number of a database, 0 before the first.
    #[must_use]
    pub fn last(&self, database: usize) -> u64 {
        let acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        acks.iter()
            .rev()
            .find(|ack| ack.database == database)
            .map_or(0, |ack| ack.id)
    }

    /// Waits until `count` more transactions are acknowledged, one of each database among them: the load is alive.
    pub fn wait_for_more(&self, count: usize) -> Result<()> {
        self.wait_for_more_within(count, wait::STEP)
    }

    /// The same with a deadline of the caller's.
    pub fn wait_for_more_within(&self, count: usize, deadline: Duration) -> Result<()> {
        let known = self.acks().len();
        wait::until("transactions to be acknowledged", deadline, || {
            if !self.running.still_runs() {
                let answer = self.running.wait(wait::STEP);
                bail!("the load has ended: {answer:?}");
            }
            let acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
            let more = acks.get(known..).unwrap_or_default();
            let is_of = |database| more.iter().any(|ack| ack.database == database);
            let is_enough = more.len() >= count && (0..self.databases).all(is_of);
            Ok(is_enough.then_some(()))
        })
    }

    /// Ends it and returns every acknowledgement.
    pub fn stop(self, vm: &Vm) -> Result<Vec<Ack>> {
        vm.shell(&format!("killall -9 {}", self.program))?;
        // Its own end is the proof that no acknowledgement follows.
        self.running.wait(wait::STEP)?;
        Ok(self.acks())
    }
}

impl Drop for Load {
    /// QEMU lets one client hold the port: the next load needs it.
    fn drop(&mut self) {
        if let Err(error) = self.port.shutdown(Shutdown::Both) {
            eprintln!("harness: cannot close the load's port: {error}");
        }
    }
}
