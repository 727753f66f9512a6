//! The load of a database server inside the guest: `guest-database-load KIND PORT CLIENTS ADDRESS`.
//!
//! Started by `harness::load` through the guest's shell. Each client commits transactions 1, 2, 3, ... of its own, one after the
//! other: a row, list entry or key with the number, and the number as the client's last, so that half a transaction shows. Each is
//! acknowledged to the host after the server has acknowledged it, with the client's number for that of the database.
//! Acknowledgements are dropped when the port has no reader or is full: the load never waits for the host.

mod etcd;

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use mysql_async::prelude::Queryable;
use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use vmshadow_tests::guest_protocol::Ack;

/// Filling of each transaction, in bytes.
const BODY_BYTES: usize = 400;

/// The tables, for a server that speaks SQL.
const TABLES: [&str; 2] = [
    "CREATE TABLE IF NOT EXISTS tx (client INT, id BIGINT, began_us BIGINT, body TEXT, PRIMARY KEY (client, id))",
    "CREATE TABLE IF NOT EXISTS latest (client INT PRIMARY KEY, id BIGINT)",
];

/// The statements of one transaction.
fn statements(client: usize, id: u64, began_us: u64) -> [String; 4] {
    [
        "BEGIN".to_owned(),
        format!("INSERT INTO tx VALUES ({client}, {id}, {began_us}, repeat('x', {BODY_BYTES}))"),
        format!("UPDATE latest SET id = {id} WHERE client = {client}"),
        "COMMIT".to_owned(),
    ]
}

/// A client's connection.
enum Connection {
    Postgresql(tokio_postgres::Client),
    Mysql(mysql_async::Conn),
    Redis(redis::aio::MultiplexedConnection),
    Etcd(etcd::Client),
}

impl Connection {
    async fn open(kind: &str, address: &str) -> Result<Self> {
        Ok(match kind {
            "postgresql" => {
                let (client, half) =
                    tokio_postgres::connect(address, tokio_postgres::NoTls).await?;
                tokio::spawn(half);
                Self::Postgresql(client)
            }
            "mariadb" | "mysql" => Self::Mysql(
                mysql_async::Conn::new(
                    mysql_async::OptsBuilder::default()
                        .socket(Some(address))
                        .user(Some(if kind == "mysql" { "client" } else { "mysql" }))
                        .db_name(Some("test")),
                )
                .await?,
            ),
            "redis" => {
                let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
                let client = redis::Client::open(address)?;
                let connection = client.get_multiplexed_async_connection_with_config(&config);
                Self::Redis(connection.await?)
            }
            "etcd" => Self::Etcd(etcd::Client::open(address).await?),
            other => bail!("unknown kind {other}"),
        })
    }

    async fn run(&mut self, statement: &str) -> Result<()> {
        match self {
            Self::Postgresql(connection) => connection.batch_execute(statement).await?,
            Self::Mysql(connection) => connection.query_drop(statement).await?,
            Self::Redis(_) | Self::Etcd(_) => bail!("it has no statements"),
        }
        Ok(())
    }

    /// Makes what the transactions need, and returns the client's last one.
    async fn prepare(&mut self, client: usize) -> Result<u64> {
        if let Self::Redis(connection) = self {
            let last: Option<u64> = redis::cmd("GET")
                .arg(format!("latest:{client}"))
                .query_async(connection)
                .await?;
            return Ok(last.unwrap_or(0));
        }
        if let Self::Etcd(connection) = self {
            let last = connection.number(format!("latest/{client}")).await?;
            return Ok(last.unwrap_or(0));
        }
        for table in TABLES {
            self.run(table).await?;
        }
        self.run(&format!(
            "INSERT INTO latest SELECT {client}, 0 WHERE NOT EXISTS (SELECT 1 FROM latest WHERE client = {client})"
        ))
        .await?;
        let query = format!("SELECT id FROM latest WHERE client = {client}");
        Ok(match self {
            Self::Postgresql(connection) => {
                let id: i64 = connection.query_one(&query, &[]).await?.try_get(0)?;
                u64::try_from(id)?
            }
            Self::Mysql(connection) => connection.query_first(query).await?.unwrap_or(0),
            Self::Redis(_) | Self::Etcd(_) => 0,
        })
    }

    async fn commit(&mut self, client: usize, id: u64, began_us: u64) -> Result<()> {
        let statements = statements(client, id, began_us);
        match self {
            // All in one message, as a pooled application would.
            Self::Postgresql(connection) => connection.batch_execute(&statements.join(";")).await?,
            Self::Mysql(connection) => {
                for statement in statements {
                    connection.query_drop(statement).await?;
                }
            }
            Self::Redis(connection) => {
                redis::pipe()
                    .atomic()
                    .rpush(format!("tx:{client}"), format!("{id} {began_us}"))
                    .set(format!("latest:{client}"), id)
                    .exec_async(connection)
                    .await?;
            }
            Self::Etcd(connection) => {
                let body = "x".repeat(BODY_BYTES);
                // Written so that the order of the keys is that of the numbers.
                let key = format!("tx/{client}/{id:020}");
                let latest = (format!("latest/{client}"), id.to_string());
                let transaction = [(key, format!("{id} {began_us} {body}")), latest];
                connection.set(transaction).await?;
            }
        }
        Ok(())
    }
}

async fn client(
    kind: String,
    address: String,
    client: usize,
    port: Arc<Mutex<std::fs::File>>,
    first: u64,
    mut connection: Connection,
) -> Result<()> {
    for id in first.. {
        let began_us = boottime_us()?;
        connection
            .commit(client, id, began_us)
            .await
            .with_context(|| format!("{kind} at {address}, client {client}"))?;
        acknowledge(
            &port,
            &Ack {
                database: client,
                id,
                began_us,
                acked_us: boottime_us()?,
            },
        )?;
    }
    Ok(())
}

fn acknowledge(port: &Mutex<std::fs::File>, ack: &Ack) -> Result<()> {
    let mut line = serde_json::to_string(ack)?;
    line.push('\n');
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    match port.write(line.as_bytes()) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::BrokenPipe) => {
            Ok(())
        }
        Err(error) => Err(error).context("the port"),
    }
}

fn boottime_us() -> Result<u64> {
    let now = clock_gettime(ClockId::Boottime);
    Ok(u64::try_from(now.tv_sec)? * 1_000_000 + u64::try_from(now.tv_nsec)? / 1000)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, port, clients, address] = arguments.as_slice() else {
        bail!("usage: guest-database-load KIND PORT CLIENTS ADDRESS");
    };
    let clients: usize = clients.parse()?;
    let port = OpenOptions::new()
        .write(true)
        .custom_flags(i32::try_from(OFlags::NONBLOCK.bits())?)
        .open(port)
        .with_context(|| port.clone())?;
    let port = Arc::new(Mutex::new(port));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..clients {
            // One after the other: tables are made once.
            let mut connection = Connection::open(kind, address).await?;
            let first = connection.prepare(number).await? + 1;
            tasks.spawn(client(
                kind.clone(),
                address.clone(),
                number,
                Arc::clone(&port),
                first,
                connection,
            ));
        }
        // Only an error ends a client, and then all.
        match tasks.join_next().await {
            Some(ended) => ended?,
            None => bail!("no client"),
        }
    })
}
