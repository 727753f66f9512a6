//! The messages of etcd's gRPC interface that this writer speaks, and one of its log's.
//!
//! Called by `session` and `layout`. Field numbers are those of etcd's `api/etcdserverpb/rpc.proto`, `raft/raftpb/raft.proto` and
//! `server/storage/wal/walpb/record.proto` (3.4 and later; numbers never change). Written out: a generator would want a protobuf
//! compiler on every machine that builds. Fields that nobody reads are left out, and skipped by the decoder.

use prost::Message;

/// `ResponseHeader`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Header {
    #[prost(uint64, tag = "1")]
    pub(crate) cluster_id: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) member_id: u64,
    #[prost(int64, tag = "3")]
    pub(crate) revision: i64,
}

/// `StatusRequest`: `/etcdserverpb.Maintenance/Status`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct StatusRequest {}

/// `StatusResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
    #[prost(string, tag = "2")]
    pub(crate) version: String,
    #[prost(int64, tag = "3")]
    pub(crate) db_size: i64,
    /// Member that leads; 0 is none.
    #[prost(uint64, tag = "4")]
    pub(crate) leader: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) raft_index: u64,
    #[prost(uint64, tag = "6")]
    pub(crate) raft_term: u64,
    #[prost(uint64, tag = "7")]
    pub(crate) raft_applied_index: u64,
    #[prost(bool, tag = "10")]
    pub(crate) is_learner: bool,
}

/// `AlarmRequest`: `/etcdserverpb.Maintenance/Alarm`. As it is by default it asks for the alarms of all members.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct AlarmRequest {}

/// `AlarmResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct AlarmResponse {
    #[prost(message, repeated, tag = "2")]
    pub(crate) alarms: Vec<AlarmMember>,
}

/// `AlarmMember`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct AlarmMember {
    #[prost(uint64, tag = "1")]
    pub(crate) member_id: u64,
    /// [`NOSPACE`], [`CORRUPT`], or one that is not known here.
    #[prost(int32, tag = "2")]
    pub(crate) alarm: i32,
}

/// The member's database has reached its quota.
pub(crate) const NOSPACE: i32 = 1;
/// The member's data is not that of its cluster.
pub(crate) const CORRUPT: i32 = 2;

/// `AuthenticateRequest`: `/etcdserverpb.Auth/Authenticate`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) password: String,
}

/// `AuthenticateResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct AuthenticateResponse {
    #[prost(string, tag = "2")]
    pub(crate) token: String,
}

/// `walpb.Record`: an entry of a log file.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Record {
    #[prost(int64, tag = "1")]
    pub(crate) kind: i64,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) data: Vec<u8>,
}

/// The kind of a [`Record`] whose data is [`LogMetadata`]: the second of each file.
pub(crate) const METADATA: i64 = 1;

/// `etcdserverpb.Metadata`: whose log it is.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct LogMetadata {
    #[prost(uint64, tag = "1")]
    pub(crate) member_id: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) cluster_id: u64,
}
