//! How a member is reached: an address, TLS, a user; and why it was not.
//!
//! Called by `session`. Certificates are read at each connection, so that they may be renewed under a running writer.

use clap::Args;
use guest_agent_wire::types::WriterFailure;
use hyper_util::rt::TokioIo;
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use tonic::codegen::http::Uri;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

/// etcd's port for clients.
const PORT: u16 = 2379;

/// How a member is reached, in the words of `etcdctl`.
#[derive(Args, Clone, Debug)]
pub struct Reach {
    /// The member in this machine, not another of its cluster.
    #[arg(long, default_value = "http://127.0.0.1:2379")]
    pub endpoint: Uri,
    /// Authorities that the member's certificate is of, for an https endpoint: a PEM file.
    #[arg(long)]
    pub cacert: Option<PathBuf>,
    /// The writer's own certificate: a PEM file.
    #[arg(long, requires_all = ["cacert", "key"])]
    pub cert: Option<PathBuf>,
    /// And its key.
    #[arg(long, requires = "cert")]
    pub key: Option<PathBuf>,
    /// User, where etcd asks for one.
    #[arg(long, requires = "password_file")]
    pub user: Option<String>,
    /// File with that user's password.
    #[arg(long, requires = "user")]
    pub password_file: Option<PathBuf>,
}

/// Why a member did not answer, in kinds that the writer tells apart.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The options or the files they name are of no use.
    #[error("{0}")]
    Options(String),
    /// Nobody is there, or the connection has broken.
    #[error("{0}")]
    Line(#[from] io::Error),
    /// It is there, but no connection comes about.
    #[error("{}", whole_story(.0.to_string(), .0))]
    Transport(#[from] tonic::transport::Error),
    /// It says no.
    #[error("{}", whole_story(.0.message().to_owned(), .0))]
    Refused(#[from] Status),
}

impl Failure {
    /// Whether it may work another time.
    pub(crate) fn judge(&self) -> WriterFailure {
        match self {
            Self::Options(_) => WriterFailure::Nonretryable,
            Self::Line(_) => WriterFailure::Retryable,
            Self::Transport(error) if is_certificate(error) => WriterFailure::Nonretryable,
            Self::Transport(_) => WriterFailure::Retryable,
            // A member looks at the writer's certificate after the connection has come about; where its word is overtaken by the
            // end of the connection, that is all we know.
            Self::Refused(status) if is_certificate(status) => WriterFailure::Nonretryable,
            Self::Refused(status) => match status.code() {
                Code::Unauthenticated
                | Code::PermissionDenied
                | Code::InvalidArgument
                | Code::Unimplemented => WriterFailure::Nonretryable,
                // A member that wants a user, and was told none.
                Code::FailedPrecondition => WriterFailure::Nonretryable,
                Code::ResourceExhausted => WriterFailure::Outofresources,
                Code::DeadlineExceeded => WriterFailure::Timeout,
                Code::Ok
                | Code::Cancelled
                | Code::Unknown
                | Code::NotFound
                | Code::AlreadyExists
                | Code::Aborted
                | Code::OutOfRange
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss => WriterFailure::Retryable,
            },
        }
    }
}

/// An error and what it comes from: the first alone says "transport error".
fn whole_story(mut story: String, error: &dyn std::error::Error) -> String {
    let mut source = error.source();
    while let Some(error) = source {
        story = format!("{story}: {error}");
        source = error.source();
    }
    story
}

/// The two do not know each other's certificates: that will not mend by itself.
fn is_certificate(error: &dyn std::error::Error) -> bool {
    let mut source = error.source();
    while let Some(error) = source {
        let is_it = |error: &io::Error| error.kind() == io::ErrorKind::InvalidData;
        if error.downcast_ref().is_some_and(is_it) {
            return true;
        }
        source = error.source();
    }
    false
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| Failure::Options(format!("{}: {error}", path.display())))
}

impl Reach {
    /// `host:port`, for a person and for the instance's name.
    pub(crate) fn address(&self) -> String {
        let host = self.endpoint.host().unwrap_or_default();
        format!("{host}:{}", self.endpoint.port_u16().unwrap_or(PORT))
    }

    fn endpoint(&self) -> Result<Endpoint, Failure> {
        let endpoint = Endpoint::from(self.endpoint.clone());
        match (self.endpoint.scheme_str(), &self.cacert) {
            (Some("http"), None) => Ok(endpoint),
            (Some("https"), Some(cacert)) => {
                let mut tls =
                    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(cacert)?));
                if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
                    tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
                }
                endpoint
                    .tls_config(tls)
                    .map_err(|error| Failure::Options(whole_story(error.to_string(), &error)))
            }
            _ => {
                let message = "http without certificates, or https with --cacert: nothing else";
                Err(Failure::Options(format!("{}: {message}", self.endpoint)))
            }
        }
    }

    /// One connection: whoever asks for a second gets none.
    pub(crate) async fn connect(&self) -> Result<(Channel, TcpStream), Failure> {
        let endpoint = self.endpoint()?;
        let host = self.endpoint.host().unwrap_or_default();
        let host = host.trim_matches(['[', ']']);
        let port = self.endpoint.port_u16().unwrap_or(PORT);
        let stream = tokio::net::TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let stream = stream.into_std()?;
        let line = stream.try_clone()?;
        let mut only = Some(tokio::net::TcpStream::from_std(stream)?);
        let connector = tower::service_fn(move |_| {
            let stream = only.take().map(TokioIo::new);
            let ended = || io::Error::from(io::ErrorKind::NotConnected);
            std::future::ready(stream.ok_or_else(ended))
        });
        let channel = endpoint.connect_with_connector(connector).await?;
        Ok((channel, line))
    }
}
