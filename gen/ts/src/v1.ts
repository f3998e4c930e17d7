/** The service: `runlane.v1`. */
export * from './gen/runlane/v1/agent_service.js';
export * from './gen/runlane/v1/error_reason.js';
export * from './gen/runlane/v1/input.js';
export * from './gen/runlane/v1/run.js';
export * from './gen/runlane/v1/run_service.js';
export * from './gen/runlane/v1/session.js';
export * from './gen/runlane/v1/session_service.js';
export * from './gen/runlane/v1/webhook_service.js';
