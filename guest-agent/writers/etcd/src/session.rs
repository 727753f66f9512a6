//! A session with a member: its calls, each with a limit.
//!
//! Called by the writer. One connection, never made anew: a member that was restarted, or another one at its address, cannot
//! answer in its place.

use crate::api::{
    AlarmRequest, AlarmResponse, AuthenticateRequest, AuthenticateResponse, CORRUPT, NOSPACE,
    StatusRequest, StatusResponse,
};
use crate::reach::{Failure, Reach};
use database_writer::Calls;
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::WriterFailure;
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::net::TcpStream;
use std::path::Path;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

/// Where a member stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The member.
    pub member_id: u64,
    /// Its cluster.
    pub cluster_id: u64,
    /// Version of the server.
    pub version: String,
    /// Of the keys: each transaction that changes any has its own.
    pub revision: i64,
    /// Of the cluster's elections.
    pub raft_term: u64,
    /// Last entry of the log.
    pub raft_index: u64,
    /// Last entry of the log that is in the database.
    pub raft_applied_index: u64,
    /// Member that leads, if there is one.
    pub leader: Option<u64>,
    /// It only listens to its cluster, and may lack anything.
    pub is_learner: bool,
    /// Size of the database's file.
    pub db_bytes: i64,
}

impl Position {
    /// The same member, no earlier. A term says nothing of it: a cluster elects whenever it likes, all the more while one of its
    /// members stands still.
    #[must_use]
    pub fn follows(&self, before: &Self) -> bool {
        (self.member_id, self.cluster_id) == (before.member_id, before.cluster_id)
            && self.raft_term >= before.raft_term
            && self.raft_applied_index >= before.raft_applied_index
            && self.revision >= before.revision
    }

    /// For the set's document. Identities are written as etcd prints them.
    #[must_use]
    pub fn evidence(&self) -> Value {
        json!({
            "member_id": format!("{:x}", self.member_id),
            "cluster_id": format!("{:x}", self.cluster_id),
            "leader": self.leader.map(|leader| format!("{leader:x}")),
            "revision": self.revision,
            "raft_term": self.raft_term,
            "raft_index": self.raft_index,
            "raft_applied_index": self.raft_applied_index,
            "db_bytes": self.db_bytes,
        })
    }
}

/// An open session.
pub(crate) struct Session {
    client: Grpc<Channel>,
    token: Option<MetadataValue<Ascii>>,
    /// The channel's connection, for a look whether it is still there.
    line: TcpStream,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn connect(reach: &Reach, calls: &Calls, call: &Call<'_>) -> Result<Self, Veto> {
        let what = format!("connecting to {}", reach.address());
        let connected = calls.within(call, &what, Failure::judge, reach.connect());
        let (channel, line) = connected?;
        let mut session = Self {
            client: Grpc::new(channel),
            token: None,
            line,
        };
        if let (Some(user), Some(file)) = (&reach.user, &reach.password_file) {
            session.log_in(user, file, calls, call)?;
        }
        Ok(session)
    }

    fn log_in(
        &mut self,
        user: &str,
        file: &Path,
        calls: &Calls,
        call: &Call<'_>,
    ) -> Result<(), Veto> {
        let unusable = |what: String| Veto::nonretryable(format!("{}: {what}", file.display()));
        let password =
            std::fs::read_to_string(file).map_err(|error| unusable(error.to_string()))?;
        let request = AuthenticateRequest {
            name: user.to_owned(),
            password: password.trim_end_matches(['\r', '\n']).to_owned(),
        };
        let path = "/etcdserverpb.Auth/Authenticate";
        let answer: AuthenticateResponse = self.ask(calls, call, path, request)?;
        let token = answer.token.parse();
        self.token = Some(token.map_err(|_| unusable("the member's token is no word".to_owned()))?);
        Ok(())
    }

    fn ask<Q, A>(
        &mut self,
        calls: &Calls,
        call: &Call<'_>,
        path: &'static str,
        question: Q,
    ) -> Result<A, Veto>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut request = Request::new(question);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        let client = &mut self.client;
        let asked = async {
            client.ready().await?;
            let codec = ProstCodec::<Q, A>::default();
            let answer = client.unary(request, PathAndQuery::from_static(path), codec);
            Ok(answer.await?.into_inner())
        };
        calls.within(call, path, Failure::judge, asked)
    }

    /// What the member itself knows; nobody else is asked, and nothing waited for.
    pub(crate) fn position(&mut self, calls: &Calls, call: &Call<'_>) -> Result<Position, Veto> {
        let path = "/etcdserverpb.Maintenance/Status";
        let status: StatusResponse = self.ask(calls, call, path, StatusRequest {})?;
        let nobody = || Veto::nonretryable("the member does not say who it is");
        let header = status.header.ok_or_else(nobody)?;
        Ok(Position {
            member_id: header.member_id,
            cluster_id: header.cluster_id,
            version: status.version,
            revision: header.revision,
            raft_term: status.raft_term,
            raft_index: status.raft_index,
            raft_applied_index: status.raft_applied_index,
            leader: Some(status.leader).filter(|leader| *leader != 0),
            is_learner: status.is_learner,
            db_bytes: status.db_size,
        })
    }

    /// Refuses a cluster with an alarm. The question goes through the cluster's log, so that when the answer is here, this member's
    /// files have everything that any member had acknowledged before it was asked; it changes no key, and needs no right to any.
    pub(crate) fn no_alarm(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        let path = "/etcdserverpb.Maintenance/Alarm";
        let answer: AlarmResponse = self.ask(calls, call, path, AlarmRequest {})?;
        let Some(raised) = answer.alarms.first() else {
            return Ok(());
        };
        let (code, name) = match raised.alarm {
            NOSPACE => (WriterFailure::Outofresources, "NOSPACE".to_owned()),
            CORRUPT => (WriterFailure::Nonretryable, "CORRUPT".to_owned()),
            other => (WriterFailure::Nonretryable, format!("of kind {other}")),
        };
        let message = format!("member {:x} has raised alarm {name}", raised.member_id);
        Err(Veto::new(code, message))
    }

    /// The member has not ended it, nor itself. Asks nothing of it.
    pub(crate) fn is_open(&self) -> bool {
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut line = [PollFd::new(&self.line, PollFlags::RDHUP)];
        let at_once = Timespec::default();
        let found = poll(&mut line, Some(&at_once));
        found.is_ok() && line.iter().all(|line| !line.revents().intersects(ended))
    }
}
