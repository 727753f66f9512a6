//! The load's client of etcd: one transaction of two keys, and the reading of one.
//!
//! Called by the load. The messages are those of etcd's `api/etcdserverpb/rpc.proto`, as far as these two calls need them.

use anyhow::{Context, Result, ensure};
use prost::Message;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, Message)]
struct Put {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `RequestOp`, which has one of several; this is the only one used here.
#[derive(Clone, PartialEq, Message)]
struct Operation {
    #[prost(message, optional, tag = "2")]
    put: Option<Put>,
}

/// `TxnRequest`; without a condition, what shall happen on success happens.
#[derive(Clone, PartialEq, Message)]
struct Transaction {
    #[prost(message, repeated, tag = "2")]
    success: Vec<Operation>,
}

#[derive(Clone, PartialEq, Message)]
struct TransactionAnswer {
    #[prost(bool, tag = "2")]
    succeeded: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Range {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct RangeAnswer {
    #[prost(message, repeated, tag = "2")]
    found: Vec<KeyValue>,
}

/// A client's connection.
pub(crate) struct Client(Grpc<Channel>);

impl Client {
    pub(crate) async fn open(address: &str) -> Result<Self> {
        let channel = Endpoint::from_shared(address.to_owned())?.connect().await?;
        Ok(Self(Grpc::new(channel)))
    }

    async fn ask<Q, A>(&mut self, path: &'static str, question: Q) -> Result<A>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.0.ready().await?;
        let codec = ProstCodec::<Q, A>::default();
        let path = PathAndQuery::from_static(path);
        let answer = self.0.unary(Request::new(question), path, codec).await?;
        Ok(answer.into_inner())
    }

    /// The number that a key's value begins with, if there is the key.
    pub(crate) async fn number(&mut self, key: String) -> Result<Option<u64>> {
        let range = Range { key: key.into() };
        let answer: RangeAnswer = self.ask("/etcdserverpb.KV/Range", range).await?;
        let Some(found) = answer.found.first() else {
            return Ok(None);
        };
        let text = std::str::from_utf8(&found.value)?;
        let number = text.split(' ').next().context("an empty value")?;
        Ok(Some(number.parse()?))
    }

    /// Sets these keys, all or none.
    pub(crate) async fn set(&mut self, pairs: [(String, String); 2]) -> Result<()> {
        let put = |(key, value): (String, String)| Operation {
            put: Some(Put {
                key: key.into(),
                value: value.into(),
            }),
        };
        let transaction = Transaction {
            success: pairs.map(put).into(),
        };
        let answer: TransactionAnswer = self.ask("/etcdserverpb.KV/Txn", transaction).await?;
        ensure!(answer.succeeded, "the transaction did not happen");
        Ok(())
    }
}
