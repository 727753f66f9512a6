//! One requester's connection: QMP framing in, operations on sets, answers and progress out.
//!
//! Called by `daemon` for each connection. Commands of a connection run one after another. While one runs the connection
//! is still read: its end cancels the command, which undoes what it began before the session is over.

use super::Shared;
use crate::error::Error;
use crate::protocol::{
    COMMAND_NAMES, QueryVms, QueryVolumes, QueryWriters, RestoreBegun, SET_PROGRESS, SetComplete,
    SetCreate, SetDelete, SetList, SetPostRestore, SetPreRestore, SetRecover, SetRevert, SetShow,
};
use crate::sets::backup::RestoreSession;
use crate::shown::plain;
use crate::snapshot::document::{SetDocument, StepTime, VmTarget};
use crate::snapshot::level::Level;
use guest_agent_wire::components::FilesRestored;
use guest_agent_wire::host::WritersSaid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, mpsc, watch};
use vhost_blk_wire::command::{
    Command, CommandInfo, Empty, QmpCapabilities, QueryCommands, QueryVersion,
};
use vhost_blk_wire::frame::JsonStream;
use vhost_blk_wire::qmp::{
    ErrorClass, Greeting, GreetingBody, QmpError, Request, ServerMessage, Timestamp, VersionInfo,
    VersionTriple,
};

/// Commands that a connection may send ahead.
const QUEUE_MAX: usize = 64;

type Running = Pin<Box<dyn Future<Output = ServerMessage> + Send>>;

/// Serves a connection until it ends or the daemon does.
pub(super) async fn serve(stream: UnixStream, shared: Arc<Shared>) {
    let (mut reader, mut writer) = stream.into_split();
    let greeting = Greeting {
        qmp: GreetingBody {
            version: version(),
            capabilities: Vec::new(),
        },
    };
    if say(&mut writer, &greeting).await.is_err() {
        return;
    }
    let (cancel, cancelled) = watch::channel(false);
    let (progress, mut steps) = mpsc::unbounded_channel::<StepTime>();
    let restore = Arc::<Mutex<Option<RestoreSession>>>::default();
    let mut ending = shared.ending.clone();
    let mut frames = JsonStream::new();
    let mut queue: VecDeque<Value> = VecDeque::new();
    let mut negotiated = false;
    let mut running: Option<Running> = None;
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        if running.is_none()
            && let Some(value) = queue.pop_front()
        {
            let context = Context {
                shared: Arc::clone(&shared),
                progress: progress.clone(),
                cancel: cancelled.clone(),
                restore: Arc::clone(&restore),
            };
            running = Some(Box::pin(answer(value, negotiated, context)));
        }
        let said = tokio::select! {
            biased;
            step = steps.recv() => match step {
                Some(step) => say(&mut writer, &progress_event(step)).await,
                None => Ok(()),
            },
            message = finished(&mut running) => {
                running = None;
                // The answer to `qmp_capabilities` is the only success before negotiation.
                if matches!(message, ServerMessage::Return { .. }) {
                    negotiated = true;
                }
                // Steps that came in the same moment belong before the answer.
                let mut said = Ok(());
                while let Ok(step) = steps.try_recv() {
                    said = said.and(say(&mut writer, &progress_event(step)).await);
                }
                said.and(say(&mut writer, &message).await)
            }
            read = reader.read(&mut buffer), if queue.len() < QUEUE_MAX => match read {
                Ok(0) | Err(_) => break,
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    match take(&mut frames, bytes, &mut queue) {
                        Ok(()) => Ok(()),
                        Err(error) => {
                            let error = QmpError::new(ErrorClass::GenericError, error);
                            let last = ServerMessage::Error { error, id: None };
                            // The place where the next message begins is lost.
                            drop(say(&mut writer, &last).await);
                            break;
                        }
                    }
                }
            },
            _ = ending.changed() => break,
        };
        if said.is_err() {
            break;
        }
    }
    if let Some(running) = running {
        // It undoes what it has begun. Nobody else listens on the channel's other end.
        cancel.send(true).ok();
        drop(running.await);
    }
}

async fn finished(running: &mut Option<Running>) -> ServerMessage {
    match running {
        Some(running) => running.await,
        None => std::future::pending().await,
    }
}

fn take(frames: &mut JsonStream, bytes: &[u8], queue: &mut VecDeque<Value>) -> Result<(), String> {
    frames.push(bytes).map_err(|e| e.to_string())?;
    while let Some(value) = frames.next_value().map_err(|e| e.to_string())? {
        queue.push_back(value);
        if queue.len() > QUEUE_MAX {
            return Err(format!("more than {QUEUE_MAX} commands ahead"));
        }
    }
    Ok(())
}

async fn say(writer: &mut OwnedWriteHalf, message: &impl Serialize) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(message).map_err(std::io::Error::other)?;
    bytes.extend_from_slice(b"\r\n");
    writer.write_all(&bytes).await
}

fn progress_event(step: StepTime) -> ServerMessage {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    ServerMessage::Event {
        event: SET_PROGRESS.to_owned(),
        data: serde_json::to_value(step).ok(),
        timestamp: Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap_or(-1),
            microseconds: i64::from(now.subsec_micros()),
        },
    }
}

fn version() -> VersionInfo {
    let number = |text: &str| text.parse().unwrap_or(0);
    VersionInfo {
        qemu: VersionTriple {
            major: number(env!("CARGO_PKG_VERSION_MAJOR")),
            minor: number(env!("CARGO_PKG_VERSION_MINOR")),
            micro: number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        package: concat!("qmp-bridge ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

struct Context {
    shared: Arc<Shared>,
    progress: mpsc::UnboundedSender<StepTime>,
    cancel: watch::Receiver<bool>,
    /// The restore that this connection has open; the connection's end gives it up.
    restore: Arc<Mutex<Option<RestoreSession>>>,
}

async fn answer(value: Value, negotiated: bool, context: Context) -> ServerMessage {
    let id = value.get("id").cloned();
    let result = match serde_json::from_value::<Request>(value) {
        Ok(request) => execute(request, negotiated, context).await,
        Err(error) => Err(QmpError::new(ErrorClass::GenericError, error.to_string())),
    };
    match result {
        Ok(value) => ServerMessage::Return { value, id },
        Err(error) => ServerMessage::Error { error, id },
    }
}

async fn execute(request: Request, negotiated: bool, context: Context) -> Result<Value, QmpError> {
    let name = request.execute.as_str();
    if !COMMAND_NAMES.contains(&name) {
        let text = format!("The command {name} has not been found");
        return Err(QmpError::new(ErrorClass::CommandNotFound, text));
    }
    if !negotiated && name != QmpCapabilities::NAME {
        let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
        return Err(QmpError::new(ErrorClass::CommandNotFound, text));
    }
    let arguments = request.arguments.unwrap_or_else(|| json!({}));
    let sets = &context.shared.sets;
    match name {
        QmpCapabilities::NAME => reply::<QmpCapabilities>(Ok(Empty {})),
        QueryVersion::NAME => reply::<QueryVersion>(Ok(version())),
        QueryCommands::NAME => {
            let names = COMMAND_NAMES.iter().map(|name| CommandInfo {
                name: (*name).to_owned(),
            });
            reply::<QueryCommands>(Ok(names.collect()))
        }
        QueryVms::NAME => {
            let vms = &context.shared.config.vm;
            let targets: Result<Vec<VmTarget>, Error> = vms
                .iter()
                .map(|vm| context.shared.config.vm(Some(&vm.name)))
                .collect();
            reply::<QueryVms>(targets)
        }
        QueryWriters::NAME => {
            let command: QueryWriters = decode(arguments)?;
            let vm = target(&context, command.vm.as_deref())?;
            reply::<QueryWriters>(sets.writers(&vm).await)
        }
        QueryVolumes::NAME => {
            let command: QueryVolumes = decode(arguments)?;
            let vm = target(&context, command.vm.as_deref())?;
            reply::<QueryVolumes>(sets.volumes(&vm.vhost_blk).await)
        }
        SetCreate::NAME => {
            let command: SetCreate = decode(arguments)?;
            let vm = target(&context, command.vm.as_deref())?;
            let made = sets
                .create(vm, command.request, context.progress, context.cancel)
                .await;
            if let Ok(document) = &made {
                log(document);
            }
            reply::<SetCreate>(made)
        }
        SetList::NAME => {
            let command: SetList = decode(arguments)?;
            reply::<SetList>(sets.list(command.vm.as_deref()).await)
        }
        SetShow::NAME => {
            let command: SetShow = decode(arguments)?;
            reply::<SetShow>(sets.find(&command.id).map(|found| found.document()))
        }
        SetDelete::NAME => {
            let command: SetDelete = decode(arguments)?;
            reply::<SetDelete>(
                sets.delete(&command.id, command.forget)
                    .await
                    .map(|()| Empty {}),
            )
        }
        SetRevert::NAME => {
            let command: SetRevert = decode(arguments)?;
            reply::<SetRevert>(sets.revert(&command.id).await.map(|()| Empty {}))
        }
        SetComplete::NAME => {
            let command: SetComplete = decode(arguments)?;
            let SetComplete {
                id,
                succeeded,
                components,
            } = command;
            reply::<SetComplete>(sets.complete(&id, succeeded, components).await)
        }
        SetPreRestore::NAME => {
            let command: SetPreRestore = decode(arguments)?;
            reply::<SetPreRestore>(pre_restore(&context, &command).await)
        }
        SetPostRestore::NAME => {
            let command: SetPostRestore = decode(arguments)?;
            reply::<SetPostRestore>(post_restore(&context, command.restored).await)
        }
        SetRecover::NAME => reply::<SetRecover>(sets.recover().await),
        // Listed above, so this is a defect of ours and not of the client.
        _ => Err(QmpError::new(
            ErrorClass::GenericError,
            format!("{name} is listed but not served"),
        )),
    }
}

async fn pre_restore(context: &Context, command: &SetPreRestore) -> Result<RestoreBegun, Error> {
    let mut cancel = context.cancel.clone();
    let sets = &context.shared.sets;
    let (session, begun) = tokio::select! {
        begun = sets.restore(command) => begun?,
        // Writers have half an hour. The conversation with the guest ends here, and with it the restore.
        _ = cancel.changed() => return Err(Error::InvalidState("cancelled".to_owned())),
    };
    *context.restore.lock().await = Some(session);
    Ok(begun)
}

async fn post_restore(context: &Context, restored: FilesRestored) -> Result<WritersSaid, Error> {
    let Some(session) = context.restore.lock().await.take() else {
        let text = "no restore is open on this connection";
        return Err(Error::InvalidState(text.to_owned()));
    };
    session.end(restored).await
}

/// Where an administrator looks: every set, and who is to blame for one that was refused.
fn log(document: &SetDocument) {
    let (set, vm) = (document.set, &document.vm.name);
    match &document.reason {
        None => tracing::info!(
            "set {set} of {vm}: {}, {}",
            document.outcome.as_str(),
            document.level_reached.map_or("-", Level::as_str)
        ),
        Some(reason) => tracing::warn!(
            "set {set} of {vm}: {}: {} before {}: {}",
            document.outcome.as_str(),
            reason.code.name(),
            reason.step,
            plain(&reason.message)
        ),
    }
}

fn target(context: &Context, name: Option<&str>) -> Result<VmTarget, QmpError> {
    match context.shared.config.vm(name) {
        Err(Error::NotFound(text)) => Err(QmpError::new(ErrorClass::DeviceNotFound, text)),
        result => result.map_err(|error| error.to_qmp()),
    }
}

fn decode<T: DeserializeOwned>(arguments: Value) -> Result<T, QmpError> {
    serde_json::from_value(arguments)
        .map_err(|error| QmpError::new(ErrorClass::GenericError, error.to_string()))
}

fn reply<C: Command>(result: Result<C::Return, Error>) -> Result<Value, QmpError> {
    let value = result.map_err(|error| error.to_qmp())?;
    serde_json::to_value(value)
        .map_err(|error| QmpError::new(ErrorClass::GenericError, error.to_string()))
}
