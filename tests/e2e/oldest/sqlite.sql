-- A database as the first schema of SQLite had it: dumped after its server was killed at work.
PRAGMA application_id = 1383427692;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE attachments (
    tenant    TEXT NOT NULL,
    run_id    TEXT NOT NULL,
    n         INTEGER NOT NULL,
    name      TEXT NOT NULL,
    mime_type TEXT NOT NULL,
    content   NOT NULL,
    PRIMARY KEY (tenant, run_id, n)
);
INSERT INTO "attachments" VALUES('default','completed',0,'b.bin','application/octet-stream',X'00FF');
INSERT INTO "attachments" VALUES('default','long',0,'a.txt','text/plain','some text');
CREATE TABLE events (
    position   INTEGER PRIMARY KEY,
    tenant     TEXT NOT NULL,
    session_id TEXT NOT NULL,
    run_id     TEXT NOT NULL,
    ended_at   INTEGER NOT NULL,
    body       TEXT NOT NULL
);
INSERT INTO "events" VALUES(1,'default','done','completed',1796042513223888,'{"session_id":"done","run_id":"completed","accept_seq":1,"state":"completed","finish_reason":"stop","message_id":"completed-m3","text":"an answer","text_truncated":false,"error":null,"folded_into":"","usage":[3,2,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042513221839,"started_at":1796042513221839,"ended_at":1796042513223888}');
INSERT INTO "events" VALUES(2,'default','done','failed',1796042513234151,'{"session_id":"done","run_id":"failed","accept_seq":2,"state":"failed","finish_reason":"error","message_id":"failed-m1","text":"","text_truncated":false,"error":["AGENT_ERROR","no"],"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042513232584,"started_at":1796042513232584,"ended_at":1796042513234151}');
INSERT INTO "events" VALUES(3,'default','done','long',1796042513237717,'{"session_id":"done","run_id":"long","accept_seq":3,"state":"completed","finish_reason":"stop","message_id":"long-m1","text":"long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long \n\nsome text","text_truncated":false,"error":null,"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042513236774,"started_at":1796042513236774,"ended_at":1796042513237717}');
INSERT INTO "events" VALUES(4,'default','lane','cancelled',1796042513749167,'{"session_id":"lane","run_id":"cancelled","accept_seq":1,"state":"cancelled","finish_reason":"canceled","message_id":"cancelled-m1","text":"one ","text_truncated":false,"error":null,"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"enough","accepted_at":1796042513239925,"started_at":1796042513239925,"ended_at":1796042513749167}');
INSERT INTO "events" VALUES(5,'default','gone','deleted',1796042513763781,'{"session_id":"gone","run_id":"deleted","accept_seq":1,"state":"completed","finish_reason":"stop","message_id":"deleted-m1","text":"delete me","text_truncated":false,"error":null,"folded_into":"","usage":[0,0,0,0,0],"attempt":1,"cancel_reason":"","accepted_at":1796042513758871,"started_at":1796042513758871,"ended_at":1796042513763781}');
CREATE TABLE messages (
    tenant        TEXT NOT NULL,
    session_id    TEXT NOT NULL,
    turn          INTEGER NOT NULL,
    ordinal       INTEGER NOT NULL,
    message_id    TEXT NOT NULL,
    run_id        TEXT NOT NULL,
    role          TEXT NOT NULL,
    finish_reason TEXT,
    model         TEXT NOT NULL,
    created_at    INTEGER NOT NULL,
    parts         TEXT,
    PRIMARY KEY (tenant, session_id, turn, ordinal)
);
INSERT INTO "messages" VALUES('default','done',1,0,'completed-m0','completed','user',NULL,'',1796042513221839,NULL);
INSERT INTO "messages" VALUES('default','done',1,1,'completed-m1','completed','assistant','tool_calls','',1796042513223888,'[["tool_call","t1","look","{\"at\": \"\\u00e9\"}"]]');
INSERT INTO "messages" VALUES('default','done',1,2,'completed-m2','completed','tool',NULL,'',1796042513223888,'[["tool_result","t1","look","seen",false]]');
INSERT INTO "messages" VALUES('default','done',1,3,'completed-m3','completed','assistant','stop','',1796042513223888,'[["text","an answer"]]');
INSERT INTO "messages" VALUES('default','done',2,0,'failed-m0','failed','user',NULL,'',1796042513232584,NULL);
INSERT INTO "messages" VALUES('default','done',2,1,'failed-m1','failed','assistant','error','',1796042513234151,NULL);
INSERT INTO "messages" VALUES('default','done',3,0,'long-m0','long','user',NULL,'',1796042513236774,NULL);
INSERT INTO "messages" VALUES('default','done',3,1,'long-m1','long','assistant','stop','',1796042513237717,'[["text","long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long \n\nsome text"]]');
INSERT INTO "messages" VALUES('default','lane',1,0,'cancelled-m0','cancelled','user',NULL,'',1796042513239925,NULL);
INSERT INTO "messages" VALUES('default','lane',1,1,'cancelled-m1','cancelled','assistant','canceled','',1796042513749167,'[["text","one "]]');
INSERT INTO "messages" VALUES('default','lane',2,0,'active-m0','active','user',NULL,'',1796042514274066,NULL);
INSERT INTO "messages" VALUES('default','other',1,0,'retried-m0','retried','user',NULL,'',1796042514278092,NULL);
CREATE TABLE meta (
    name  TEXT NOT NULL PRIMARY KEY,
    value NOT NULL
) WITHOUT ROWID;
INSERT INTO "meta" VALUES('compacted',0);
INSERT INTO "meta" VALUES('store_id',X'894F166C234CED46');
CREATE TABLE prompts (
    tenant TEXT NOT NULL,
    run_id TEXT NOT NULL,
    rest   TEXT NOT NULL,
    PRIMARY KEY (tenant, run_id)
);
INSERT INTO "prompts" VALUES('default','long','ong long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long ');
CREATE TABLE run_events (
    tenant TEXT NOT NULL,
    run_id TEXT NOT NULL,
    idx    INTEGER NOT NULL,
    at     INTEGER NOT NULL,
    kind   TEXT NOT NULL,
    body   TEXT,
    PRIMARY KEY (tenant, run_id, idx)
) WITHOUT ROWID;
INSERT INTO "run_events" VALUES('default','active',1,1796042514274066,'accepted','[2]');
INSERT INTO "run_events" VALUES('default','active',2,1796042514274066,'started','[1]');
INSERT INTO "run_events" VALUES('default','active',3,1796042514275867,'text_delta','["one "]');
INSERT INTO "run_events" VALUES('default','cancelled',1,1796042513239925,'accepted','[1]');
INSERT INTO "run_events" VALUES('default','cancelled',2,1796042513239925,'started','[1]');
INSERT INTO "run_events" VALUES('default','cancelled',3,1796042513240754,'text_delta','["one "]');
INSERT INTO "run_events" VALUES('default','cancelled',4,1796042513749167,'run_complete',NULL);
INSERT INTO "run_events" VALUES('default','completed',1,1796042513221839,'accepted','[1]');
INSERT INTO "run_events" VALUES('default','completed',2,1796042513221839,'started','[1]');
INSERT INTO "run_events" VALUES('default','completed',3,1796042513223888,'tool_call','["t1","look","{\"at\": \"\\u00e9\"}"]');
INSERT INTO "run_events" VALUES('default','completed',4,1796042513223888,'tool_result','["t1","look","seen",false]');
INSERT INTO "run_events" VALUES('default','completed',5,1796042513223888,'text_delta','["an answer"]');
INSERT INTO "run_events" VALUES('default','completed',6,1796042513223888,'run_complete',NULL);
INSERT INTO "run_events" VALUES('default','failed',1,1796042513232584,'accepted','[2]');
INSERT INTO "run_events" VALUES('default','failed',2,1796042513232584,'started','[1]');
INSERT INTO "run_events" VALUES('default','failed',3,1796042513234151,'run_complete',NULL);
INSERT INTO "run_events" VALUES('default','long',1,1796042513236774,'accepted','[3]');
INSERT INTO "run_events" VALUES('default','long',2,1796042513236774,'started','[1]');
INSERT INTO "run_events" VALUES('default','long',3,1796042513237717,'text_delta','["long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long \n\nsome text"]');
INSERT INTO "run_events" VALUES('default','long',4,1796042513237717,'run_complete',NULL);
INSERT INTO "run_events" VALUES('default','retried',1,1796042514278092,'accepted','[1]');
INSERT INTO "run_events" VALUES('default','retried',2,1796042514278092,'started','[1]');
INSERT INTO "run_events" VALUES('default','retried',3,1796042514279170,'text_delta','["one "]');
INSERT INTO "run_events" VALUES('default','waiting',1,1796042514276535,'accepted','[3]');
CREATE TABLE runs (
    run_no             INTEGER PRIMARY KEY,
    tenant             TEXT NOT NULL,
    run_id             TEXT NOT NULL,
    session_id         TEXT NOT NULL,
    accept_seq         INTEGER NOT NULL,
    state              TEXT NOT NULL,
    when_busy          TEXT NOT NULL,
    rank               INTEGER NOT NULL,
    turn               INTEGER NOT NULL,
    timeout            INTEGER,
    max_attempts       INTEGER NOT NULL,
    attempt            INTEGER NOT NULL,
    accepted_at        INTEGER NOT NULL,
    started_at         INTEGER,
    ended_at           INTEGER,
    folded_into        TEXT NOT NULL,
    cancel_reason      TEXT NOT NULL,
    finish_reason      TEXT,
    error_reason       TEXT,
    error_message      TEXT,
    message_id         TEXT,
    usage              TEXT,
    metadata           TEXT,
    attachments        INTEGER NOT NULL,
    prompt_fingerprint TEXT NOT NULL,
    prompt_head        TEXT NOT NULL,
    UNIQUE (tenant, run_id)
);
INSERT INTO "runs" VALUES(1,'default','completed','done',1,'completed','queue',1,1,NULL,1,1,1796042513221839,1796042513221839,1796042513223888,'','','stop',NULL,NULL,'completed-m3','[3,2,0,0,0]','{"label":"x"}',1,'c0a4cb34dff77447c62ccea10b567121','[{"usage": {"input_tokens": 3, "output_tokens": 2}}, {"tool_call": {"id": "t1", "name": "look", "arguments": {"at": "\u00e9"}}}, {"tool_result": {"id": "t1", "name": "look", "content": "seen"}}, {"text": "an answer"}]');
INSERT INTO "runs" VALUES(2,'default','failed','done',2,'failed','queue',2,2,NULL,1,1,1796042513232584,1796042513232584,1796042513234151,'','','error','AGENT_ERROR','no','failed-m1',NULL,NULL,0,'11e05610f9729f9425a3c6931e4bc4b5','[{"fail": "no"}]');
INSERT INTO "runs" VALUES(3,'default','long','done',3,'completed','queue',3,3,NULL,1,1,1796042513236774,1796042513236774,1796042513237717,'','','stop',NULL,NULL,'long-m1',NULL,NULL,1,'436c29a2f63dc10ec81d2f94297b05ab','long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long long l');
INSERT INTO "runs" VALUES(4,'default','cancelled','lane',1,'cancelled','queue',1,1,NULL,1,1,1796042513239925,1796042513239925,1796042513749167,'','enough','canceled',NULL,NULL,'cancelled-m1',NULL,NULL,0,'275daca973c1476fdd5473bd9f3fe0cb','[{"text": "one "}, {"wait": "never"}, {"text": "two"}]');
INSERT INTO "runs" VALUES(5,'default','active','lane',2,'active','queue',2,2,NULL,1,1,1796042514274066,1796042514274066,NULL,'','',NULL,NULL,NULL,NULL,NULL,NULL,0,'275daca973c1476fdd5473bd9f3fe0cb','[{"text": "one "}, {"wait": "never"}, {"text": "two"}]');
INSERT INTO "runs" VALUES(6,'default','waiting','lane',3,'queued','queue',3,0,NULL,1,0,1796042514276535,NULL,NULL,'','',NULL,NULL,NULL,NULL,NULL,NULL,0,'bfd859d66676030e62c5bd8dc36b3a99','[{"text": "waited"}]');
INSERT INTO "runs" VALUES(7,'default','retried','other',1,'active','queue',1,1,NULL,2,1,1796042514278092,1796042514278092,NULL,'','',NULL,NULL,NULL,NULL,NULL,NULL,0,'22ae8c0ed564b45c83375126a339336e','[{"text": "one "}, {"wait": "none"}, {"text": "two"}]');
CREATE TABLE sessions (
    created_no         INTEGER PRIMARY KEY,
    tenant             TEXT NOT NULL,
    session_id         TEXT NOT NULL,
    version            INTEGER NOT NULL,
    accept_seq         INTEGER NOT NULL,
    turn               INTEGER NOT NULL,
    active_run_id      TEXT NOT NULL,
    waiting_runs       INTEGER NOT NULL,
    title              TEXT NOT NULL,
    metadata           TEXT,
    input_tokens       INTEGER NOT NULL DEFAULT 0,
    output_tokens      INTEGER NOT NULL DEFAULT 0,
    cache_read_tokens  INTEGER NOT NULL DEFAULT 0,
    cache_write_tokens INTEGER NOT NULL DEFAULT 0,
    requests           INTEGER NOT NULL DEFAULT 0,
    created_at         INTEGER NOT NULL,
    updated_at         INTEGER NOT NULL,
    UNIQUE (tenant, session_id)
);
INSERT INTO "sessions" VALUES(1,'default','empty',1,0,0,'',0,'A title','{"k":"v"}',0,0,0,0,0,1796042513218965,1796042513218965);
INSERT INTO "sessions" VALUES(2,'default','done',6,3,3,'',0,'',NULL,3,2,0,0,0,1796042513221839,1796042513237717);
INSERT INTO "sessions" VALUES(3,'default','lane',5,3,2,'active',1,'',NULL,0,0,0,0,0,1796042513239925,1796042514276535);
INSERT INTO "sessions" VALUES(4,'default','other',1,1,1,'retried',0,'',NULL,0,0,0,0,0,1796042514278092,1796042514278092);
CREATE INDEX sessions_by_tenant ON sessions (tenant, created_no);
CREATE INDEX runs_by_session ON runs (tenant, session_id, run_no);
CREATE INDEX runs_open ON runs (tenant, session_id, run_no) WHERE ended_at IS NULL;
CREATE INDEX runs_ended ON runs (tenant, state, run_no) WHERE ended_at IS NOT NULL;
CREATE INDEX events_by_session ON events (tenant, session_id, position);
CREATE INDEX events_by_run ON events (tenant, run_id, position);
COMMIT;
